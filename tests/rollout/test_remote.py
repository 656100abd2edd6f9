"""Rewards over HTTP, against a real server on this machine: what is sent, what is taken, what is refused."""

import gzip
import logging
import time
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import ArgumentParser

from lit_align.rollout import remote
from lit_align.rollout.remote import RemoteReward
from lit_align.rollout.rewards import RewardFunction
from tests.rollout.reward_server import Judge, serving

ASKED = ["a?", "b?", "c?"], ["one", "three", "seven"], [{"key": 1}, {"key": "zwei 二"}, {}]


def lengths(asked):
    return [len(answer) for answer in asked["answers"]]


def ask(judge, *asked, **options):
    with serving(judge) as url:
        return RemoteReward(url, **{"backoff": 0.0, **options})(*(asked or ASKED))


def test_the_answers_are_sent_in_batches_and_come_back_in_their_order():
    judge = Judge(lengths)
    assert ask(judge, batch_size=2) == [3.0, 5.0, 5.0]
    prompts, answers, records = ASKED
    assert judge.requests == [
        {"prompts": prompts[:2], "answers": answers[:2], "records": records[:2]},
        {"prompts": prompts[2:], "answers": answers[2:], "records": records[2:]},
    ]
    assert judge.headers[0]["Content-Type"] == "application/json"
    assert ask(Judge(lengths), [], [], []) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([1.0, 2.0], r"expected a JSON list of 3 finite numbers, got a list of 2"),
        (b"[1, NaN, 3]", r"got nan at place 1"),
        (b"[1, 2, 1e999]", r"got inf at place 2"),
        ([1, 2, 10**50], r"got 1000+ at place 2"),
        ([1, True, 3], r"got True at place 1"),
        ([1, None, "3"], r"got None at place 1"),
        ({"scores": [1, 2, 3]}, r"got dict: '{\"scores\""),
        (b"<html><body>Bad gateway</body></html>", r"got what is not JSON: '<html><body>Bad gateway</body></html>'"),
        (b"", r"got what is not JSON: an empty body"),
        (b"[" * 100_000, r"got a reply of more than \d+ bytes|not JSON"),
        (b"[" * 60_000, r"not JSON: '\[\[+'\.\.\."),
        (b"[" + b"1," * 200_000 + b"1]", r"got a reply of more than 65728 bytes"),
        ((404, b"no such page"), r"expected status 200, got status 404: 'no such page'"),
        ((302, b""), r"expected status 200, got status 302"),
        ((422, {"detail": "prompts missing"}), r"got status 422: '{\"detail\""),
    ],
)
def test_what_is_not_the_answer_is_an_error_at_once_that_names_the_server(said, message):
    judge = Judge(said)
    with pytest.raises(ValueError, match=message) as error:
        ask(judge, retries=3)
    assert str(error.value).startswith("reward server http://127.0.0.1:")
    assert len(judge.requests) == 1


def test_a_server_that_fails_in_passing_is_asked_again(caplog):
    judge = Judge((500, b"out of memory"), (503, b"loading"), lengths)
    with caplog.at_level(logging.WARNING):
        assert ask(judge, retries=2) == [3.0, 5.0, 5.0]
    assert judge.requests == [judge.requests[0]] * 3
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "got status 500: 'out of memory'; asking again in 0 s",
        "got status 503: 'loading'; asking again in 0 s",
    ]


def test_attempts_are_bounded_and_the_waits_double(monkeypatch):
    waits, judge = [], Judge((500, b"out of memory"))
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    with pytest.raises(ValueError, match=r"no rewards after 9 attempts: got status 500: 'out of memory'; expected a"):
        ask(judge, retries=8, backoff=1.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60] and len(judge.requests) == 9


def test_a_server_that_hangs_up_is_asked_again():
    hang_up = SimpleNamespace(write=lambda handler: setattr(handler, "close_connection", True))
    assert ask(Judge(hang_up, lengths), retries=1) == [3.0, 5.0, 5.0]


def _drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "40")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def _drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(40):
        handler.wfile.write(b"X-%d: wait\r\n" % number)
        time.sleep(0.1)


def _squeeze(handler):
    """A compressed body, which nobody asked for."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    content = gzip.compress(b"[1, 2, 3]")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.mark.parametrize(
    "write",
    [lambda handler: time.sleep(1.5), _drip, _drip_headers],
    ids=["silent", "dripping", "dripping headers"],
)
def test_a_slow_server_meets_the_time_limit(write):
    judge, start = Judge(SimpleNamespace(write=write)), time.monotonic()
    with pytest.raises(ValueError, match=r"no rewards after 2 attempts: no whole reply within 0\.3 s"):
        ask(judge, time_limit=0.3, retries=1)
    assert time.monotonic() - start < 3 and len(judge.requests) == 2


def test_a_compressed_body_is_not_unfolded():
    with pytest.raises(ValueError, match="not JSON"):
        ask(Judge(SimpleNamespace(write=_squeeze)))


def test_a_server_that_is_not_there_is_named():
    with serving(Judge(lengths)) as url:
        pass
    with pytest.raises(ValueError, match=rf"reward server {url}: no rewards after 2 attempts: ConnectError: .*refused"):
        RemoteReward(url, retries=1, backoff=0.0)(*ASKED)


def test_a_record_that_json_cannot_say_is_an_error():
    with pytest.raises(ValueError, match=r"a record cannot be written as JSON: .*not JSON serializable"):
        RemoteReward("http://127.0.0.1:1/")([""], [""], [{"key": {1, 2}}])


def test_the_token_is_sent_and_written_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-word")

    def echo(asked):
        return 500, f"who is {judge.headers[-1]['Authorization']}?".encode()

    judge = Judge(echo)
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError) as error:
        ask(judge, retries=1, token_env="REWARD_TOKEN", headers={"X-Judge": "strict"})
    assert judge.headers[0]["Authorization"] == "Bearer s3cret-word" and judge.headers[0]["X-Judge"] == "strict"
    assert (
        "'who is Bearer ***?'" in str(error.value) and "s3cret" not in str(error.value) and "s3cret" not in caplog.text
    )
    reward = RemoteReward("http://127.0.0.1:1/", token_env="REWARD_TOKEN")
    assert "s3cret" not in repr(vars(reward))


def test_a_token_follows_no_redirection(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-word")
    judge = Judge((302, b""))
    with pytest.raises(ValueError, match="status 302"):
        ask(judge, token_env="REWARD_TOKEN")
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://host/x"}, "expected http://host/path or https"),
        ({"url": "score.example/x"}, "expected http://host/path or https"),
        ({"url": "http://host:port/x"}, "is none"),
        ({"url": "http://me:word@host/x"}, "it holds a user or password"),
        ({"headers": {"authorization": "Bearer x"}}, "would be written to config.yaml; set token_env"),
        ({"headers": {"X-A": "b\r\nX-C: d"}}, "cannot be sent"),
        ({"headers": {"X A": "b"}}, "cannot be sent"),
        ({"token_env": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN is not set"),
        ({"token_env": "BROKEN_TOKEN"}, "BROKEN_TOKEN holds characters that a header cannot hold$"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"retries": -1}, "retries: got -1"),
        ({"time_limit": 0}, "time_limit: got 0"),
        ({"time_limit": float("inf")}, "time_limit: got inf"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_runs(options, message, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    monkeypatch.setenv("BROKEN_TOKEN", "a\nb")
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": "http://host/x", **options})


def test_it_is_written_in_yaml_and_its_configuration_holds_no_token(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-word")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--functions", type=list[RewardFunction])
    init_args = {"url": "http://127.0.0.1:1/score?key=1", "token_env": "REWARD_TOKEN"}
    function = {"class_path": "lit_align.rollout.remote.RemoteReward", "init_args": init_args}
    config = parser.parse_object({"functions": [{"function": function, "weight": 2.0}]})
    (built,) = parser.instantiate(config).functions
    assert isinstance(built.function, RemoteReward) and built.name == "http://127.0.0.1:1/score"
    written = yaml.safe_load(parser.dump(config))["functions"][0]
    assert written["weight"] == 2.0 and written["function"]["init_args"]["token_env"] == "REWARD_TOKEN"
    assert "s3cret" not in parser.dump(config)
