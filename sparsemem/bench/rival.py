"""The mixture of experts of Hugging Face `transformers` (extra `compare`), stepping on demand in a process of its own.

`python -m sparsemem.bench.rival` takes one JSON object, the config of a Qwen2-MoE with `threads`, `sequences`,
`positions`, `device`, `bf16` and `kept` (our settings of the process, which its users do not have), makes a step for
each further line and answers with its seconds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from sparsemem.bench.measure import Place, progress
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.mechanisms import EXPERTS
from sparsemem.train.step import prepare_process


@contextmanager
def rivals(trial: Trial, place: Place) -> Iterator[dict[str, Callable[[], float]]]:
    """Functions that make a step of the same shape and return its seconds; none where `transformers` is
    not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        progress("step: transformers is not installed (pip install 'sparsemem[compare]'); measured without it")
        yield {}
        return
    sizes, model = solve(trial.model, trial.budget, trial.shares), trial.model
    experts = EXPERTS.of(model)
    config = {
        "vocab_size": trial.data.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "num_experts": sizes.routed_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.expert_width,
        "shared_expert_intermediate_size": sizes.shared_width,
        "max_position_embeddings": trial.data.context,
        "use_cache": False,
    }
    batch = {"sequences": trial.train.batch_tokens // trial.data.context, "positions": trial.data.context}
    order = {"config": config, "threads": torch.get_num_threads(), **batch}
    order |= {"device": place.device.type, "bf16": place.precision == torch.bfloat16}
    command = [sys.executable, "-m", __name__]
    with ExitStack() as stack:
        steps = {}
        for name, kept in {"transformers": False, "transformers-kept": True}.items():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            stack.enter_context(process)  # ends with its input
            steps[name] = _asking(process, order | {"kept": kept})
        yield steps


def _asking(process: subprocess.Popen[str], order: dict[str, Any]) -> Callable[[], float]:

    def ask(line: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"the process of transformers ended with {process.wait()}")
        return answer

    ask(json.dumps(order))
    return lambda: float(ask(""))


def main() -> None:
    order = json.loads(sys.stdin.readline())
    torch.set_num_threads(order["threads"])
    if order["kept"]:
        prepare_process(order["threads"])
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(**order["config"])
    place = Place(torch.device(order["device"]), torch.bfloat16 if order["bf16"] else torch.float32)
    network = Qwen2MoeForCausalLM(config).to(place.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    print("ready", flush=True)

    def step(tokens_BT: torch.Tensor) -> None:
        with place.autocast():
            loss = network(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in sys.stdin:
        tokens_BT = torch.randint(config.vocab_size, (order["sequences"], order["positions"]), device=place.device)
        print(place.timed(partial(step, tokens_BT)), flush=True)


if __name__ == "__main__":
    main()
