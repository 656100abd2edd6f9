"""Side by side with TRL, case by case, alternating, one process at a time; results go to `benchmarks/results`.

Usage: python -m benchmarks.compare [CASE ...] [--smoke]     (`make bench` sets up the peers' environments first)

Each case: the same weights and token ids are written down; our stage and the peer's trainer run in turn, in processes
of their own with the same number of threads; the gate compares first loss, first gradient norm and every loss of the
timed steps; a peer's run that does not pass gives no number. Every round runs all of them anew, so that a ratio is
always one of neighbours in time. After the first round, which tries every way to run the peer, the best of columns
B and C go on, and A where it was faster than B: against these the claim is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import flops
from benchmarks.meter import machine, matrix_rate
from benchmarks.prepare import prepare
from benchmarks.process import Places, run
from benchmarks.settings import CASES, REPOSITORY, Case, Settings
from benchmarks.stats import TOLERANCES, gate, median, percentile, timed
from benchmarks.table import render
from benchmarks.tokens import load_tokens, scored_tokens, unique_tokens

NAMES = (*CASES, "growth")


def useful_flops_per_token(case: Case, settings: Settings, scratch: Path) -> float:
    """Mean over all examples of the case."""
    shape = flops.Shape.of(json.loads((scratch / "policy" / "config.json").read_text(encoding="utf-8")))
    rows = load_tokens(scratch)
    if case.stage == "ppo":
        prompts = [len(row["prompt"]) for row in rows]
        total = flops.ppo_iteration(shape, prompts, settings.response_length, settings.ppo_epochs)
        return total / (sum(prompts) + settings.response_length * len(rows))
    costs = (
        flops.example(shape, case.stage, len(row["prompt"]), list(map(len, row["branches"])), scored_tokens(row))
        for row in rows
    )
    return sum(costs) / sum(map(unique_tokens, rows))


def summary(runs: list[dict[str, Any]], settings: Settings, per_token: float, rates: list[float]) -> dict[str, Any]:
    """The runs of one way to run one side."""
    totals = [timed(one, settings.warmup) for one in runs]
    steps = [
        step["tokens"] / seconds
        for one in runs
        for step, seconds in list(zip(one["steps"], one["seconds"], strict=True))[settings.warmup :]
    ]
    floors = [per_token * total["tokens"] / rate for total, rate in zip(totals, rates, strict=True)]
    return {
        "tokens_per_second": median([total["tokens_per_second"] for total in totals]),
        "examples_per_second": median([total["examples_per_second"] for total in totals]),
        "step_tokens_per_second": {"p10": percentile(steps, 0.1), "p50": median(steps), "p90": percentile(steps, 0.9)},
        "tokens_per_second_without_extra": median([t["tokens"] / t["seconds_without_extra"] for t in totals]),
        "cpu_seconds_per_1000_tokens": median([1000 * t["cpu_seconds"] / t["tokens"] for t in totals]),
        "peak_bytes_above_weights": median([one["peak_bytes_above_weights"] for one in runs]),
        "bytes_with_weights": median([one["baseline_bytes"] for one in runs]),
        "ratio_to_floor": median([f / total["seconds"] for f, total in zip(floors, totals, strict=True)]),
        "rounds": len(runs),
        "versions": runs[0]["versions"],
        "threads": runs[0]["threads"],
    }


class Comparison:
    """One case, round after round."""

    def __init__(self, case: Case, settings: Settings, places: Places, only: list[str] | None) -> None:
        self.case, self.settings, self.places = case, settings, places
        self.columns = {v: c for v, c in case.peers if only is None or v in only}
        self.ours: list[dict[str, Any]] = []
        self.peers: dict[str, list[tuple[int, dict[str, Any]]]] = {v: [] for v in self.columns}
        self.faults: dict[str, list[str]] = {}
        self.rates: list[float] = []
        self.tolerances = TOLERANCES[settings.dtype]

    def gate_ppo(self) -> None:
        """PPO samples, so its gate is a run of its own, in which both sides are given the same answers."""
        ours = run(self.case, "ours", self.places, self.settings, forced=True)
        for variant in self.columns:
            peer = self._try(variant, forced=True)
            if peer is not None and (faults := gate(ours, peer, True, self.tolerances)):
                print(f"  {variant}: no number: {'; '.join(faults)}", flush=True)
                self.faults[variant] = faults

    def round(self, variants: list[str]) -> None:
        """Ours, then each way to run the peer."""
        dtype = getattr(torch, self.settings.dtype)
        self.rates.append(matrix_rate(device=self.settings.device, dtype=dtype))
        ours = run(self.case, "ours", self.places, self.settings)
        self.ours.append(ours)
        self._say("ours", ours)
        for variant in variants:
            peer = self._try(variant)
            if peer is None:
                continue
            if self.case.stage != "ppo":
                same_order = not ("grouped" in variant or "bfd" in variant)
                if faults := gate(ours, peer, same_order, self.tolerances):
                    self.faults[variant] = faults
                    print(f"  {variant}: no number: {'; '.join(faults)}", flush=True)
                    continue
            self.peers[variant].append((len(self.ours) - 1, peer))
            self._say(variant, peer)

    def rivals(self) -> list[str]:
        """Against these the claim is made: the fastest of B and of C, and of A where it is faster than that of B."""
        best = {self.columns[v]: v for v in self.best()}
        if "A" in best and "B" in best and self._speed(best["A"]) <= self._speed(best["B"]):
            del best["A"]
        return list(best.values())

    def best(self) -> list[str]:
        """The fastest way of each column that passed the gate."""
        fastest: dict[str, tuple[float, str]] = {}
        for variant, runs in self.peers.items():
            if runs and variant not in self.faults:
                column = self.columns[variant]
                fastest[column] = max(fastest.get(column, (0.0, "")), (self._speed(variant), variant))
        return [variant for _, (_, variant) in sorted(fastest.items())]

    def _speed(self, variant: str) -> float:
        return median([timed(one, self.settings.warmup)["tokens_per_second"] for _, one in self.peers[variant]])

    def result(self) -> dict[str, Any]:
        """Everything, as it is written down."""
        scratch, warmup = self.places.scratch / self.case.name, self.settings.warmup
        per_token = useful_flops_per_token(self.case, self.settings, scratch)
        speeds = [timed(one, warmup)["tokens_per_second"] for one in self.ours]
        peers = {}
        for variant, runs in self.peers.items():
            entry: dict[str, Any] = {"column": self.columns[variant], "faults": self.faults.get(variant, [])}
            if runs and not entry["faults"]:
                rates = [self.rates[number] for number, _ in runs]
                entry |= summary([one for _, one in runs], self.settings, per_token, rates)
                ratios = [speeds[number] / timed(one, warmup)["tokens_per_second"] for number, one in runs]
                entry["ours_is_faster"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
            peers[variant] = entry
        return {
            "case": self.case.name,
            "stage": self.case.stage,
            "model": self.places.model.name,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": f"python -m benchmarks.compare {self.case.name}",
            "settings": asdict(self.settings),
            "matrix_gflops": median(self.rates) / 1e9,
            "useful_gflop_per_token": per_token / 1e9,
            "ours": summary(self.ours, self.settings, per_token, self.rates),
            "peers": peers,
            "best": self.best(),
        }

    def _try(self, variant: str, forced: bool = False) -> dict[str, Any] | None:
        if variant in self.faults:
            return None
        try:
            return run(self.case, variant, self.places, self.settings, forced)
        except RuntimeError as error:
            self.faults[variant] = [str(error)]
            print(f"  {variant}: {error}", flush=True)
            return None

    def _say(self, name: str, one: dict[str, Any]) -> None:
        total = timed(one, self.settings.warmup)
        memory = one["peak_bytes_above_weights"] / 2**20
        print(f"  {name}: {total['tokens_per_second']:.1f} useful tokens/s, {memory:.0f} MiB", flush=True)


def compare(case: Case, settings: Settings, places: Places, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a case."""
    settings = settings_of(case, settings)
    print(f"{case.name}: {settings.warmup} + {settings.steps} steps of {settings.batch_size}", flush=True)
    begin = time.perf_counter()
    prepare(case, settings, places.model, places.scratch / case.name)
    comparison = Comparison(case, settings, places, options.variants)
    if case.stage == "ppo" and comparison.columns:
        comparison.gate_ppo()
    first = time.perf_counter()
    comparison.round(list(comparison.columns))
    longest = time.perf_counter() - first
    for _ in range(options.rounds - 1):
        if time.perf_counter() - begin + longest > options.seconds and len(comparison.ours) >= options.least_rounds:
            break
        comparison.round(comparison.rivals())
    print(f"  {len(comparison.ours)} rounds, {time.perf_counter() - begin:.0f} s", flush=True)
    return comparison.result()


def settings_of(case: Case, settings: Settings) -> Settings:
    """The case's own: layers, and for PPO as many iterations as the prompts are enough for."""
    if case.layers is not None and settings.layers == Settings.layers:
        settings = replace(settings, layers=case.layers)
    return replace(settings, warmup=1, steps=min(settings.steps, 3)) if case.stage == "ppo" else settings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("cases", nargs="*", help=f"of {', '.join(NAMES)}; default: all")
    made.add_argument("--model", type=Path, default=REPOSITORY / "models" / "smollm2-135m-instruct")
    made.add_argument("--scratch", type=Path, default=REPOSITORY / "build" / "benchmarks")
    made.add_argument("--peers", type=Path, default=REPOSITORY / ".venv-peers")
    made.add_argument("--peers-ppo", type=Path, default=REPOSITORY / ".venv-peers-ppo")
    made.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    made.add_argument("--variants", nargs="+", help="only these ways to run the peer")
    made.add_argument("--rounds", type=int, default=3, help="at most so many rounds of a case")
    made.add_argument("--least-rounds", type=int, default=2, help="at least so many, whatever the time")
    made.add_argument("--seconds", type=float, default=180, help="no further round of a case after so long")
    made.add_argument("--warmup", type=int, default=1)
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--threads", type=int, default=Settings.threads)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--dtype", default="float32", choices=tuple(TOLERANCES))
    made.add_argument("--smoke", action="store_true", help="tiny sizes, one round, and no result is written")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; 1 if any peer's run gave no number."""
    options = parser().parse_args(arguments)
    if unknown := set(options.cases) - set(NAMES):
        raise SystemExit(f"unknown cases {sorted(unknown)}; there are {', '.join(NAMES)}")
    if not (options.model / "config.json").is_file():
        raise SystemExit(f"no model at {options.model}: run `make smollm`, or give --model")
    settings = Settings(warmup=options.warmup, steps=options.steps, threads=options.threads)
    settings = replace(settings, device=options.device, dtype=options.dtype)
    results = options.results / options.device if options.device != "cpu" else options.results
    if options.smoke:
        settings = replace(settings, layers=1, batch_size=2, max_length=64, response_length=8, ppo_epochs=2, steps=2)
        options.rounds, options.least_rounds = 1, 1
    torch.set_num_threads(options.threads)
    places = Places(options.model, options.scratch, options.peers, options.peers_ppo)
    failed = False
    for name in options.cases or NAMES:
        if name == "growth":
            if options.device != "cpu":
                print("growth: it is measured on a CPU alone, so not here", flush=True)
                continue
            command = [sys.executable, "-m", "benchmarks.growth", "--threads", str(options.threads)]
            command += ["--results", str(results.resolve())]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            more = ["--smoke"] * options.smoke
            failed |= subprocess.run(command + more, cwd=REPOSITORY, env=environment, check=False).returncode != 0
            continue
        result = compare(CASES[name], settings, places, options)
        failed |= any(peer["faults"] for peer in result["peers"].values())
        if options.smoke:
            print(f"  smoke run, not kept: ratios {ratios_of(result)}")
        else:
            results.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1) + "\n"
            (results / f"{name}.json").write_text(text, encoding="utf-8")
    if not options.smoke:
        print(render(results))
    return int(failed)


def ratios_of(result: dict[str, Any]) -> dict[str, float]:
    """By how much ours is faster than each way to run the peer."""
    peers = result["peers"].items()
    return {v: round(p["ours_is_faster"]["median"], 2) for v, p in peers if "ours_is_faster" in p}


if __name__ == "__main__":
    sys.exit(main())
