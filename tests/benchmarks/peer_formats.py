"""What the peers load, made from a Hugging Face directory: ONNX, int8 models, CTranslate2's format.

Each function writes one stage's model into `folder`, under the name of the stage.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
N_CALIBRATION = 300  # NNCF's own default for post-training quantization


def onnx(source: Path, folder: Path) -> None:
    """Export to `NAME.onnx`, and what ONNX Runtime's BERT optimizer makes of that to `NAME-optimized.onnx`."""
    import torch
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import BertForSequenceClassification

    path = folder / f"{source.name}.onnx"
    path.parent.mkdir(exist_ok=True)
    model = BertForSequenceClassification.from_pretrained(source, attn_implementation="eager").eval()
    example = torch.ones((2, 16), dtype=torch.int64)
    torch.onnx.export(
        model,
        (example, example, torch.zeros_like(example)),
        path,
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_axes={name: {0: "n", 1: "length"} for name in INPUTS} | {"logits": {0: "n"}},
        opset_version=17,
        dynamo=False,
    )
    optimized = optimize_model(
        str(path),
        model_type="bert",
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
        opt_level=0,
    )
    print(path.stem, optimized.get_fused_operator_statistics())
    optimized.save_model_to_file(str(path.with_name(f"{path.stem}-optimized.onnx")))


def onnx_dynamic(source: Path, folder: Path) -> None:
    """Write `NAME-int8-dynamic.onnx`: int8 weights, one scale per column; activations are quantized while it runs.

    ONNX Runtime's static quantization was tried: it is no faster (43 against 41 ms for 32 texts of 12 tokens on one
    core of a Zen 4), and it changes twice as many answers of the intent stage (14 against 7 of 200).
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / f"{source.name}-optimized.onnx",
        folder / f"{source.name}-int8-dynamic.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        # Types cannot be inferred through the nodes that ONNX Runtime's optimizer makes; all of them are float32.
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


def openvino_dynamic(source: Path, folder: Path) -> None:
    """Write `NAME-int8-dynamic.xml`: int8 weights; OpenVINO quantizes the activations while it runs."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / f"{source.name}.onnx")
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(compressed, folder / f"{source.name}-int8-dynamic.xml", compress_to_fp16=False)


def openvino_static(source: Path, folder: Path, calibration: list[list[int]]) -> None:
    """Write `NAME-int8-static.xml`: NNCF's post-training quantization with the calibration texts."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / f"{source.name}.onnx")
    data = nncf.Dataset(list(_inputs(calibration)))
    quantized = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration))
    openvino.save_model(quantized, folder / f"{source.name}-int8-static.xml", compress_to_fp16=False)


def ctranslate2(source: Path, folder: Path) -> None:
    """Write CTranslate2's encoder and pooler to `NAME/`, and the classifier to `NAME/head.npz`."""
    from ctranslate2.converters import TransformersConverter
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(source, copy, dirs_exist_ok=True)
        config = Path(copy) / "config.json"
        # The converter asks for this key, which transformers 5 no longer writes; it knows no other kind.
        written = json.loads(config.read_text(encoding="utf-8")) | {"position_embedding_type": "absolute"}
        config.write_text(json.dumps(written), encoding="utf-8")
        TransformersConverter(copy).convert(str(folder / source.name))
    weights = load_file(source / "model.safetensors")
    np.savez(folder / source.name / "head.npz", weights=weights["classifier.weight"], bias=weights["classifier.bias"])


def _inputs(calibration: list[list[int]]) -> Iterator[dict[str, np.ndarray]]:
    """Give each text's inputs, without padding: shape (1, length), int64."""
    for ids in calibration:
        row = np.array([ids], dtype=np.int64)
        yield dict(zip(INPUTS, (row, np.ones_like(row), np.zeros_like(row)), strict=True))
