"""The service against clients and tools of others, where they are installed: `pip install` them to run these tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import texts
from test_serving_load import serving

from cascade_lab import Cascade

DOCKERFILE = Path(__file__).parents[1] / "cascade_lab" / "serving" / "Dockerfile"


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_reads_the_answers(tiny, binary):
    client = pytest.importorskip("tritonclient.http")
    pool = [*texts(20), "", "ünï 😀"]
    with Cascade.load(tiny) as cascade:
        expected = cascade.predict(pool)
    with serving(tiny) as (_, port), client.InferenceServerClient(f"127.0.0.1:{port}") as triton:
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("tiny")
        metadata = triton.get_model_metadata("tiny")
        assert [tensor["name"] for tensor in metadata["inputs"]] == ["text", "text_b"]
        sent = client.InferInput("text", [len(pool)], "BYTES")
        sent.set_data_from_numpy(np.array(pool, dtype=object), binary_data=binary)
        wanted = [client.InferRequestedOutput(name, binary_data=binary) for name in ("predicted", "gate_probability")]
        for outputs in (None, wanted):
            result = triton.infer("tiny", [sent], outputs=outputs)
            assert [str(label) for label in result.as_numpy("predicted")] == expected.predicted.tolist()
            np.testing.assert_allclose(result.as_numpy("gate_probability"), expected.gate_probability, atol=1e-5)
        all_of_it = triton.infer("tiny", [sent]).as_numpy("intent_probability")
        np.testing.assert_allclose(all_of_it, expected.intent_probability, atol=1e-5)
        with pytest.raises(client.InferenceServerException, match="there is no model 'other'"):
            triton.infer("other", [sent])


@pytest.mark.slow
@pytest.mark.parametrize("with_key", [False, True])
def test_schemathesis_finds_no_fault_and_the_service_does_not_grow(with_key, tiny, tmp_path):
    pytest.importorskip("schemathesis")
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    small = ["--max-texts", 8, "--max-characters", 200]  # requests up to the limits are made faster
    with serving(tiny, *small, *(["--api-key-file", key] if with_key else [])) as (process, port):
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
        command += ["--checks", checks, "--seed", "0"]
        # Without a deadline it also asks for 1 ms, which is answered with 504.
        command += [
            "--header",
            "X-Request-Timeout: 10",
            *(["--header", f"Authorization: Bearer {key.read_text().strip()}"] if with_key else []),
        ]
        memory = []
        for number in (100, 1000):
            done = subprocess.run(
                [*command, "--max-examples", str(number)], capture_output=True, text=True, check=False, cwd=tmp_path
            )
            assert done.returncode == 0, done.stdout[-5000:]
            assert process.poll() is None
            memory.append(psutil.Process(process.pid).memory_info().rss)
        print(done.stdout[-1500:], f"memory {memory[1] / memory[0]:.3f}")
        assert memory[1] < 1.05 * memory[0]


def test_the_dockerfile_copies_what_is_there_and_starts_a_known_command():
    lines = [line.split(maxsplit=1) for line in DOCKERFILE.read_text().splitlines() if line and line[0] != "#"]
    known = "FROM WORKDIR COPY RUN USER EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD"
    assert {name for name, _ in lines} <= set(known.split())
    for name, rest in lines:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (DOCKERFILE.parents[2] / source).exists(), source
    command = json.loads(dict(lines)["ENTRYPOINT"])
    health = json.loads(dict(lines)["HEALTHCHECK"].partition(" CMD ")[2])
    compile(health[2], "health check", "exec")
    assert command[1:] == ["serve", "--host", "0.0.0.0", "--port", "8000"]
    assert ":8000/v2/health/ready" in health[2]
    assert dict(lines)["USER"] == "10001"
