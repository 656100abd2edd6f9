"""What both sides of the comparison share: the cases, and every number that must be equal on both."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BARE = {
    "logger": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Lightning trainer that does nothing but train."""
RECORDS = Path(os.environ.get("LIT_ALIGN_SHARED", REPOSITORY.parent / "shared")) / "data"


@dataclass(frozen=True)
class Settings:
    """Equal on both sides, whatever the case.

    Attributes:
        layers: The model is cut to its first layers.
        batch_size: Examples (conversations, pairs, prompts) of an optimizer step.
        max_length: Tokens of a conversation, or of a prompt with its longer answer.
        warmup: Steps before the clock starts; the gate looks at the first of them.
        steps: Steps on the clock.
        threads: Of torch, on either side.
        seed: Of everything.
        lr: Learning rate, constant.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        clip: Largest gradient norm; PPO is not clipped, as its peer does not.
        log_every: Steps between two logged ones.
        response_length: Tokens of every PPO answer, forced.
        ppo_epochs: Passes over a rollout.
        device: "cpu" or "cuda".
        dtype: Of weights and arithmetic.
    """

    layers: int = 6
    batch_size: int = 8
    max_length: int = 512
    warmup: int = 2
    steps: int = 5
    threads: int = 2
    seed: int = 1
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    log_every: int = 10
    response_length: int = 48
    ppo_epochs: int = 4
    device: str = "cpu"
    dtype: str = "float32"

    def save(self, path: Path) -> None:
        """Writes them for the processes of both sides."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Settings:
        """What `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "betas": tuple(values["betas"])})


@dataclass(frozen=True)
class Case:
    """One thing that is compared.

    Attributes:
        name: Of the case.
        stage: "sft", "dpo", "rm" or "ppo".
        records: File of real records, below the folder of records; None = made of `lengths`.
        ratio: For made-up pairs: prompt tokens per answer token.
        peers: Ways to run the peer: name -> column (A = as shipped, B = its best flags, C = B with our attention).
        layers: Other than the settings'; None = theirs.
        recompute: Whether activations are computed again in backward, on both sides; TRL as shipped always does.
    """

    name: str
    stage: str
    records: str | None = None
    ratio: float | None = None
    peers: tuple[tuple[str, str], ...] = ()
    layers: int | None = None
    recompute: bool = False


_SFT = (("shipped", "A"), ("plain", "B"), ("grouped", "B"), ("padding-free", "B"), ("bfd", "B"))
_SFT += (("padding-free+ours", "C"), ("bfd+ours", "C"))
_DPO = (("shipped", "A"), ("plain", "B"), ("precomputed", "B"), ("precomputed-grouped", "B"))
_RM = (("shipped", "A"), ("plain", "B"), ("grouped", "B"))
_PPO = (("shipped", "A"), ("plain", "B"))

CASES = {
    case.name: case
    for case in (
        Case("sft", "sft", "sft/medical_sft.jsonl", peers=_SFT),
        Case("dpo", "dpo", "preference/dpo_zh.jsonl", peers=_DPO),
        Case("dpo-recompute", "dpo", "preference/dpo_zh.jsonl", peers=(_DPO[0], _DPO[2]), recompute=True),
        Case("dpo-0.4", "dpo", ratio=0.4, peers=_DPO[2:3]),
        Case("dpo-2", "dpo", ratio=2.0, peers=_DPO[2:3]),
        Case("dpo-4", "dpo", ratio=4.0, peers=_DPO[2:3]),
        Case("rm", "rm", "preference/dpo_zh.jsonl", peers=_RM),
        Case("ppo", "ppo", "prompts/medical_qa.jsonl", peers=_PPO),
        Case("sft-30", "sft", "sft/medical_sft.jsonl", layers=30),
    )
}


def records_of(case: Case) -> Path:
    """The file of the case's records.

    Raises:
        SystemExit: It is not there.
    """
    path = RECORDS / str(case.records)
    if not path.is_file():
        raise SystemExit(
            f"{case.name}: no records at {path}; set LIT_ALIGN_SHARED to a folder with data/{case.records} in it"
        )
    return path
