from dataclasses import dataclass

import torch

from lit_align.cli.keys import class_at, closest, config_files, line_of, options_of, type_of, where_of


@dataclass
class Inner:
    path: str = ""
    size: int = 0


class Base:
    def __init__(self, common: float = 0.0, hidden: int = 1) -> None: ...


class Child(Base):
    def __init__(self, own: Inner | None = None, **kwargs) -> None: ...


def test_options_are_the_constructors_and_those_that_kwargs_hand_on():
    assert options_of(Child) == ["own", "common", "hidden"]
    assert options_of(Inner) == ["path", "size"]
    assert options_of(Inner | None) == ["path", "size"]
    assert options_of(int) == [] and options_of(None) == []
    assert "lr" in options_of(torch.optim.AdamW)


def test_types_are_followed_through_parents_and_unions():
    assert type_of(Child, "common") is float
    assert type_of(type_of(Child, "own"), "size") is int
    assert type_of(Child, "nothing") is None


def test_a_class_is_found_by_its_path_or_not_at_all():
    assert class_at("torch.optim.AdamW") is torch.optim.AdamW
    assert class_at("torch.optim.Nothing") is None
    assert class_at("no_such_module.Thing") is None
    assert class_at("AdamW") is None


def test_the_closest_name_ignores_case_and_may_be_none():
    assert closest("litdpo", ["LitDPO", "LitPPO"]) == "LitDPO"
    assert closest("xyz", ["beta", "margin"]) is None


def test_config_files_are_those_of_the_command_in_order():
    args = ["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml", "--x=1"]
    assert [str(path) for path in config_files(args)] == ["a.yaml", "b.yaml", "c.yaml"]


def test_a_key_is_found_with_and_without_init_args_and_in_lists(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  init_args:\n    loss:\n      init_args: {beta: 1}\ntrainer:\n  callbacks+:\n  - every: 3\n"
    )
    assert line_of("model.loss.beta", file) == 4
    assert line_of("model.init_args.loss", file) == 3
    assert line_of("trainer.callbacks.every", file) == 7
    assert line_of("model.nothing", file) is None
    assert line_of("model", tmp_path / "missing.yaml") is None


def test_the_command_line_comes_before_later_files_before_earlier_ones(tmp_path):
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("a: 1\nb: 2\n")
    two.write_text("b: 3\n")
    args = ["fit", f"--config={one}", f"--config={two}", "--c.init_args.d=1"]
    assert where_of("a", args) == f"{one}:1"
    assert where_of("b", args) == f"{two}:1"
    assert where_of("c.d", args) == "the command line"
    assert where_of("e", args) is None
