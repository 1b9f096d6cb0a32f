"""The contenders: each loads the same weights its own way and answers texts with the same serial cascade.

A contender is a function of a folder (see `prepare.py`) and of what its process is set to; it returns the function
that answers texts. Nothing here imports another contender's library.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Answers = tuple[list[str], list[float]]
"""The answer to each text, and its probability."""

Predict = Callable[..., Answers]
"""`predict(texts, batch=…, grouping=…)`."""

Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Token ids and mask, int64, shape (n, length), to logits, shape (n, n_labels)."""


def cascade_lab(folder: Path, *, precision: str) -> Predict:
    """This package, by its public API; it chooses its threads itself, and its batches unless told."""
    from cascade_lab import Cascade

    cascade = Cascade.load(folder / f"cascade-{precision}.toml")

    def predict(texts: Sequence[str], *, batch: int | None = None) -> Answers:
        table = cascade.predict(texts, **({} if batch is None else {"batch_size": batch}))
        return table["predicted"].tolist(), table["probability"].tolist()

    return predict


def script(folder: Path, *, precision: str, max_seq_length: int = 128) -> Predict:
    """What people write: two v1 sessions, bert-tensorflow's graph, every text padded to `max_seq_length`."""
    import tensorflow as tf

    from cascade_lab.bert import reference
    from cascade_lab.bert.checkpoint import find_checkpoint, read_config
    from cascade_lab.bert.graph import classifier_graph
    from cascade_lab.spec import CascadeSpec

    models = []
    for stage in CascadeSpec.read(folder / "cascade-float32.toml").stages:
        names = {"output_weights": stage.output_weights, "output_bias": stage.output_bias}
        ends = classifier_graph(read_config(stage.bert_config_file), len(stage.labels), **names)
        session = tf.compat.v1.Session(graph=ends.graph)
        with ends.graph.as_default():
            ends.saver.restore(session, find_checkpoint(stage.init_checkpoint))
        tokenizer = reference.load("tokenization").FullTokenizer(str(stage.vocab_file), stage.do_lower_case)
        models.append((stage, ends, session, tokenizer))

    def probabilities(model: tuple, texts: Sequence[str], batch: int) -> np.ndarray:
        _, ends, session, tokenizer = model
        parts = []
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            input_ids, input_mask, segment_ids = np.zeros((3, len(part), max_seq_length), dtype=np.int32)
            for row, text in enumerate(part):
                tokens = ["[CLS]", *tokenizer.tokenize(text)[: max_seq_length - 2], "[SEP]"]
                input_ids[row, : len(tokens)] = tokenizer.convert_tokens_to_ids(tokens)
                input_mask[row, : len(tokens)] = 1
            fed = dict(zip(ends.inputs, (input_ids, input_mask, segment_ids), strict=True))
            parts.append(session.run(ends.logits_t, fed))
        return _softmax(np.concatenate(parts))

    def predict(texts: Sequence[str], *, batch: int) -> Answers:
        gate, intent = models
        pass_row = gate[0].labels.index(gate[0].pass_label)
        passing = probabilities(gate, texts, batch)[:, pass_row]
        passed = np.flatnonzero(passing >= gate[0].threshold)
        answers, sure = [gate[0].labels[1 - pass_row]] * len(texts), 1 - passing
        if len(passed):
            scores = probabilities(intent, [texts[i] for i in passed], batch)
            sure[passed] = scores.max(axis=1)
            for i, label in zip(passed, scores.argmax(axis=1), strict=True):
                answers[i] = intent[0].labels[label]
        return answers, sure.tolist()

    return predict


def pytorch(folder: Path, *, precision: str, callers: int, threads: int, backend: str | None = None) -> Predict:
    """PyTorch and transformers, scaled dot-product attention; no mask where a batch has one length.

    In bfloat16 the weights are too: `torch.autocast` was slower in every measurement of 2026-11-25.
    `backend` is one of `torch.compile`, which then compiles each model for any number of texts and tokens; a mask is
    always given, since each kind of input takes seconds to compile.
    """
    import torch
    from transformers import BertForSequenceClassification

    torch.set_num_threads(threads)

    def forward(stage: dict[str, Any]) -> Forward:
        model = BertForSequenceClassification.from_pretrained(
            folder / "hf" / stage["name"],
            dtype=getattr(torch, precision),
            attn_implementation="sdpa",
        ).eval()
        if backend is not None:
            model = torch.compile(model, backend=backend, dynamic=True)

        def run(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            mask_t = None if mask.all() and backend is None else torch.from_numpy(mask)
            with torch.inference_mode():
                return model(torch.from_numpy(input_ids), attention_mask=mask_t).logits.float().numpy()

        if backend is not None:
            for n, length in ((2, 16), (1, 16), (9, 9), (1, 9)):  # compiled at the first call of each kind
                run(*np.ones((2, n, length), dtype=np.int64))
        return run

    return _cascade(folder, forward, callers)


def zentorch(folder: Path, *, precision: str, callers: int, threads: int) -> Predict:
    """PyTorch compiled by AMD's zentorch, with the weights frozen into the graph."""
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        raise RuntimeError("zentorch is made for AMD's processors")
    import torch._inductor.config
    import zentorch  # noqa: F401  (registers the backend)

    torch._inductor.config.freezing = True
    return pytorch(folder, precision=precision, callers=callers, threads=threads, backend="zentorch")


def onnx_runtime(folder: Path, *, precision: str, callers: int, threads: int) -> Predict:
    """ONNX Runtime on the graph that its BERT optimizer made, or on that graph in int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    made = {"float32": "optimized", "int8 dynamic": "int8-dynamic"}[precision]

    def forward(stage: dict[str, Any]) -> Forward:
        path = folder / "onnx" / f"{stage['name']}-{made}.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            return session.run(["logits"], _named(input_ids, mask))[0]

        return run

    return _cascade(folder, forward, callers)


def openvino(folder: Path, *, precision: str, callers: int, threads: int, hint: str) -> Predict:
    """OpenVINO on the exported ONNX graph, or on what NNCF made of it in int8; one stream per caller.

    In int8 it chooses the precision of what is not quantized itself: bfloat16 where the processor has it.
    """
    import openvino

    core = openvino.Core()
    config = {
        "PERFORMANCE_HINT": hint,
        "NUM_STREAMS": callers,
        "INFERENCE_NUM_THREADS": callers * threads,
        **{
            "float32": {"INFERENCE_PRECISION_HINT": "f32"},
            "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"},
            "int8 dynamic": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32},
            "int8 static": {},
        }[precision],
    }
    made = {"int8 dynamic": "-int8-dynamic.xml", "int8 static": "-int8-static.xml"}.get(precision, ".onnx")

    def forward(stage: dict[str, Any]) -> Forward:
        model = core.compile_model(folder / "onnx" / f"{stage['name']}{made}", "CPU", config)
        mine = threading.local()

        def run(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            if not hasattr(mine, "request"):
                mine.request = model.create_infer_request()
            return mine.request.infer(_named(input_ids, mask), share_inputs=True)[0].copy()

        return run

    return _cascade(folder, forward, callers)


def ctranslate2(folder: Path, *, precision: str, callers: int, threads: int) -> Predict:
    """CTranslate2's BERT encoder with its pooler, and the classifier in numpy; it has no bfloat16 on a processor."""
    import ctranslate2

    def forward(stage: dict[str, Any]) -> Forward:
        path = folder / "ctranslate2" / stage["name"]
        encoder = ctranslate2.Encoder(
            str(path),
            device="cpu",
            compute_type={"float32": "float32", "int8 dynamic": "int8"}[precision],
            inter_threads=callers,
            intra_threads=threads,
        )
        head = np.load(path / "head.npz")
        weights, bias = head["weights"].T, head["bias"]
        array = ctranslate2.StorageView.from_array

        def run(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            lengths = mask.sum(axis=1, dtype=np.int32)
            encoded = encoder.forward_batch(array(input_ids.astype(np.int32)), array(lengths))
            return np.asarray(encoded.pooler_output) @ weights + bias

        return run

    return _cascade(folder, forward, callers)


def _named(input_ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": np.zeros_like(input_ids)}


def _cascade(folder: Path, load: Callable[[dict[str, Any]], Forward], callers: int) -> Predict:
    """Return the serial cascade over the stages at `folder`, as a careful user of a peer would write it."""
    from tokenizers import BertWordPieceTokenizer

    stages = json.loads((folder / "hf" / "export.json").read_text(encoding="utf-8"))["stages"]
    forwards = [load(stage) for stage in stages]
    tokenizers, kinds = [], []
    for stage in stages:
        vocab = folder / "hf" / stage["name"] / "vocab.txt"
        tokenizers.append(BertWordPieceTokenizer(str(vocab), lowercase=stage["do_lower_case"]))
        tokenizers[-1].enable_truncation(stage["max_seq_length"])
        kinds.append((vocab.read_bytes(), stage["do_lower_case"], stage["max_seq_length"]))
    pool = ThreadPoolExecutor(callers) if callers > 1 else None

    def probabilities(place: int, ids: list[list[int]], batch: int, grouping: str) -> np.ndarray:
        scores = np.empty((len(ids), len(stages[place]["labels"])), dtype=np.float32)

        def score(rows: np.ndarray) -> None:
            length = max(len(ids[row]) for row in rows)
            input_ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
            for i, row in enumerate(rows):
                input_ids[i, : len(ids[row])] = ids[row]
                mask[i, : len(ids[row])] = 1
            scores[rows] = forwards[place](input_ids, mask)

        batches = cut(np.array([len(row) for row in ids]), batch, grouping)
        for _ in (pool.map if pool else map)(score, batches):
            pass
        return _softmax(scores)

    def predict(texts: Sequence[str], *, batch: int, grouping: str) -> Answers:
        answers, sure = [""] * len(texts), np.full(len(texts), np.nan)
        arrived = np.arange(len(texts))
        for place, stage in enumerate(stages):
            if not len(arrived):
                break
            if place == 0 or kinds[place] != kinds[place - 1]:  # else the stage before cut the texts alike
                found = tokenizers[place].encode_batch([texts[i] for i in arrived])
                ids = dict(zip(arrived, (encoding.ids for encoding in found), strict=True))
            scores = probabilities(place, [ids[i] for i in arrived], batch, grouping)
            passes = np.zeros(len(arrived), dtype=bool)
            if stage["pass_label"] is not None:
                column = stage["labels"].index(stage["pass_label"])
                passes = scores[:, column] >= stage["threshold"]
                scores[:, column] = -1
            sure[arrived] = scores.max(axis=1)
            for i, label in zip(arrived, scores.argmax(axis=1), strict=True):
                answers[i] = stage["labels"][label]
            arrived = arrived[passes]
        return answers, sure.tolist()

    return predict


def answer_requests(predict: Predict, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer the texts of several HTTP requests together, as a service of a peer does."""
    labels, probabilities = predict([text for r in requests for text in r["texts"]], batch=32, grouping="sorted")
    rows = iter(zip(labels, probabilities, strict=True))
    keys = ("predicted", "probability")
    return [{"answers": [dict(zip(keys, next(rows), strict=True)) for _ in r["texts"]]} for r in requests]


def cut(lengths: np.ndarray, batch: int, grouping: str) -> Iterator[np.ndarray]:
    """Cut rows into batches, longest first: `sorted` ones of like length, or `exact` ones of one length."""
    order = np.argsort(-lengths, kind="stable")
    groups = [order]
    if grouping == "exact":
        groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
    for group in groups:
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def tensorflow_products(*, callers: int, threads: int) -> Callable[[str], float]:
    """TensorFlow's rate on large products, in GFLOP/s: `rate(precision)`."""
    import tensorflow as tf

    tf1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default():
        products = {}
        for precision in ("float32", "bfloat16"):
            # Variables, since a product of constants would be computed once and folded away.
            a, b = (tf1.get_variable(f"{name}_{precision}", initializer=_square(precision)) for name in "ab")
            products[precision] = tf.linalg.matmul(a, b).op
        config = tf1.ConfigProto(intra_op_parallelism_threads=threads)
        session = tf1.Session(graph=graph, config=config)
        session.run(tf1.global_variables_initializer())
    return lambda precision: _rate(lambda: session.run(products[precision]), callers)


def pytorch_products(*, callers: int, threads: int) -> Callable[[str], float]:
    """PyTorch's rate on large products, in GFLOP/s: `rate(precision)`."""
    import torch

    torch.set_num_threads(threads)
    squares = {
        precision: [torch.from_numpy(_square("float32")).to(getattr(torch, precision)) for _ in "ab"]
        for precision in ("float32", "bfloat16")
    }
    return lambda precision: _rate(lambda: torch.matmul(*squares[precision]), callers)


SIZE = 2048  # of the square products


def _square(precision: str) -> np.ndarray:
    import ml_dtypes

    square = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return square.astype(np.float32 if precision == "float32" else ml_dtypes.bfloat16)


def _rate(product: Callable[[], Any], callers: int, *, seconds: float = 0.5) -> float:
    """Let each caller repeat `product` for that long, and return what all did together, in GFLOP/s."""
    from time import perf_counter

    def call(_: int) -> float:
        product()
        start, n = perf_counter(), 0
        while perf_counter() - start < seconds:
            product()
            n += 1
        return n * 2 * SIZE**3 / (perf_counter() - start) / 1e9

    with ThreadPoolExecutor(callers) as pool:
        return sum(pool.map(call, range(callers)))
