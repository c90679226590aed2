"""Functions are timed in turn."""

from __future__ import annotations

import pytest

from ip_plugin.utils import timing


def test_calls_take_turns_and_the_warmup_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name: str) -> None:
        order.append(name)
        clock[0] += {"a": 1.0, "b": 10.0}[name] * len(order)

    found = timing.side_by_side({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [40.0, 60.0]}


def test_what_prepares_a_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    def prepare() -> object:
        pass_time(100.0)
        return lambda: pass_time(2.0)

    assert timing.side_by_side({"a": prepare}, rounds=3, warmup=0, prepared=True) == {"a": [2.0] * 3}
