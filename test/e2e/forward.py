"""SGLang's model runner without a server: log-probabilities of given tokens, family after family.

    python -m e2e.forward JOBS RESULTS

`JOBS` is a JSON list of `{"model": FOLDER, "sequences": [{"tokens": [...], "prompt": N}]}`. For
each sequence `RESULTS` has the log-probability of every token but the first, and which token was
the likeliest: the prompt is prefilled in chunks, what follows it is decoded token by token. SGLang
keeps one model a process, and its imports take longest, so each model gets a fork of this process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from array import array
from pathlib import Path
from typing import Any

os.environ["SGLANG_PLATFORM"] = "engram_cpu"
os.environ["SGLANG_MAMBA_CONV_DTYPE"] = "float32"

import torch
from sglang.benchmark import one_batch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.server_args import PortArgs, ServerArgs

from e2e.reference import CHUNK
from engram.sglang_plugin import cpu


def main(jobs: Path, results: Path) -> None:
    torch.set_num_threads(1)
    cpu.install()
    found = []
    for number, job in enumerate(json.loads(jobs.read_text())):
        part = results.with_name(f"{results.name}.{number}")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                part.write_text(json.dumps(compute(job)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"no result for {job['model']}")
        found.append(json.loads(part.read_text()))
    results.write_text(json.dumps(found))


def compute(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One model's results, in the order of its sequences."""
    arguments = ServerArgs(
        model_path=job["model"],
        dtype="float32",
        max_total_tokens=2048,
        max_mamba_cache_size=16,
        disable_radix_cache=True,
        mamba_radix_cache_strategy="no_buffer",
        disable_overlap_schedule=True,
    )
    one_batch.publish(
        arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0)
    )
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    rows = keep_rows()
    return [score(runner, rows, **sequence) for sequence in job["sequences"]]


def keep_rows() -> list[torch.Tensor]:
    """A list that gets the log-probabilities of every forward: [tokens, vocabulary] each."""
    rows: list[torch.Tensor] = []
    upstream = LogitsProcessor.forward

    def forward(self: Any, ids: Any, hidden: Any, head: Any, batch: Any, *more: Any) -> Any:
        metadata = LogitsMetadata.from_forward_batch(batch)
        logits = self._get_logits(hidden, head, metadata, use_logits_buffer=False)
        rows.append(torch.log_softmax(logits.float(), -1))
        return upstream(self, ids, hidden, head, batch, *more)

    LogitsProcessor.forward = forward
    return rows


def score(runner: Any, rows: list[torch.Tensor], tokens: list[int], prompt: int) -> dict[str, Any]:
    """The result of one sequence, of which `prompt` tokens are the prompt."""
    runner.clear()
    rows.clear()
    request = one_batch.Req(
        rid="0",
        origin_input_text="",
        origin_input_ids=array("q"),
        sampling_params=one_batch.SamplingParams(temperature=0, max_new_tokens=len(tokens)),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    for begin in range(0, prompt, CHUNK):
        end = min(begin + CHUNK, prompt)
        request.full_untruncated_fill_ids.extend(tokens[begin:end])
        if begin:
            request.prefix_len = begin
        request.logprob_start_len, request.extend_end = -1, end
        _, _, batch = runner.extend([request])
    for token in tokens[prompt:-1]:
        runner.decode(torch.tensor([token]), batch)
    scores = torch.cat(rows)
    assert len(scores) == len(tokens) - 1
    return {
        "log_probabilities": scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist(),
        "likeliest": scores.argmax(1).tolist(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
