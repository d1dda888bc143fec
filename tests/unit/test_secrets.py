"""One redaction: nothing secret survives it, and what is no secret does."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config, logs
from cluster.cli import explain, private_files
from cluster.errors import RunFailure, UsageError
from cluster.rundir import RunDir
from cluster.secrets import holds_secret, redact, redacted
from cluster.slurm import arguments
from pipeline.config import PretrainConfig
from pipeline.tracking.uri import tracking_uri

PASSWORD = st.text(string.ascii_letters + string.digits + "/@:?#&=+%!$'()*,;~._-", min_size=8, max_size=24).map(
    lambda text: f"Qx{text}xQ"
)


@given(PASSWORD, st.sampled_from(["db", "db.example.org", "10.0.0.1", "[::1]"]), st.sampled_from(["", ":5432"]))
def test_no_password_of_a_url_survives(password: str, host: str, port: str) -> None:
    for uri in (
        f"postgresql+psycopg2://user:{password}@{host}{port}/mlflow",
        f"https://:{password}@{host}{port}/",
        f"http://user:{password}@{host}{port}",
    ):
        assert password not in str(redact(uri)), uri
        assert host in str(redact(uri))
        tree = redact({"tracking": {"uri": uri}, "list": [uri]})
        assert password not in json.dumps(tree)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/api?password=CANARY&x=1", "postgresql://h/db?user=u&password=CANARY", "https://CANARY@github.com/a/b.git",
        "export AWS_SECRET_ACCESS_KEY=CANARY", "MLFLOW_TRACKING_TOKEN='CANARY'", "password: CANARY", '{"password": "CANARY"}',
        '{"aws_secret_access_key": "CANARY"}', "Authorization: Bearer CANARYxyz", "failed for http://u:a@b/CANARY@host.x: away",
        "s3://bucket/key?X-Amz-Signature=CANARY&X-Amz-Date=1", "--tracking.uri=postgresql://u:CANARY@h/db", "api_key=CANARY",
        "-    uri: http://me:CANARY@host:5000", "db_passwd=CANARY;", "('http://u:CANARY@h:1',)",
    ],
)  # fmt: skip
def test_secrets_of_every_form_are_taken_out(text: str) -> None:
    assert "CANARY" not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/run@2/x", "http://host:5000/#/experiments/1", "sqlite:////a/b.db", "postgresql://postgres@127.0.0.1:5432/m",
        "tokens=5 num_tokens=3 model.tokenizers=2", "optimizer.lr_scale={backbone.tokenizers: 0.2}", "file:///a/b@c:d", "a@b.org",
        "step 3: loss 1.5", "https://host/path?x=1&y=2", "/plain/path", "token = self._shared_token(world)",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert redact(text) == text


def test_values_of_secret_variables_are_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-one")
    monkeypatch.setenv("GEOLOOM_TRACKING_URI", "http://u:CANARY-two@host")
    assert redacted("x CANARY-one y 'CANARY-two'") == "x *** y '***'"


def test_values_are_found_in_every_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Quoted for a URL, decoded by a client, escaped for JSON, and one that looks like a path."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/CANARY+one/x")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", 'CANARY"three')
    monkeypatch.setenv("GEOLOOM_TRACKING_URI", "http://u:CANARY%2Ftwo%40@host")
    monkeypatch.setenv("DEPLOY_PRIVATE_KEY", str(tmp_path))  # where a key lies is no secret
    for text in ("/CANARY+one/x", "%2FCANARY%2Bone%2Fx", "CANARY%2Ftwo%40", "CANARY/two@", json.dumps('CANARY"three')):
        assert "CANARY" not in redacted(f"a {text} b"), text
    assert redacted(f"{tmp_path}/file") == f"{tmp_path}/file"


def test_no_form_of_a_config_that_is_kept_holds_one(tmp_path: Path) -> None:
    tree = config.load(PretrainConfig, None, ["tracking.uri=postgresql://u:CANARY/@x@host/db"])
    assert "CANARY" in tree.tracking.uri  # the process itself has it
    other = config.load(PretrainConfig, None, ["tracking.uri=postgresql://u:another@host/db"])
    assert "CANARY" not in json.dumps(config.to_dict(tree))
    assert config.fingerprint(tree) == config.fingerprint(other)  # the password is no setting
    RunDir(str(tmp_path)).write_resolved(tree)
    assert "CANARY" not in (tmp_path / "resolved.json").read_text()
    with pytest.raises(UsageError, match="export GEOLOOM_TRACKING_URI"):
        arguments.refuse_secrets(config.to_dict(tree))


def test_the_uri_comes_from_the_environment_where_it_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"MLFLOW_TRACKING_URI": "http://b", "GEOLOOM_TRACKING_URI": "http://a"}
    assert tracking_uri("env", env) == "http://a"
    assert tracking_uri("env", {"MLFLOW_TRACKING_URI": "http://b"}) == "http://b"
    assert tracking_uri("http://u:***@host", env) == "http://a"
    assert tracking_uri("none", env) == "none"
    for configured in ("env", "http://u:***@host"):
        with pytest.raises(UsageError, match="set GEOLOOM_TRACKING_URI or MLFLOW_TRACKING_URI"):
            tracking_uri(configured, {})


def test_logs_failures_and_messages_hold_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "no answer from http://u:CANARY@host:5000"
    stream, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(stream)
    handler.setFormatter(logs.Redacting("%(message)s"))
    try:
        raise RunFailure(text)
    except RunFailure as error:
        handler.handle(logging.LogRecord("x", 40, "", 0, "it %s", (error,), (type(error), error, error.__traceback__)))
        logs.record_failure(str(tmp_path), 0, 1, error)
        explain("prog", error)
    assert "it no answer from http://u:***@host" in stream.getvalue()
    assert "CANARY" not in stream.getvalue() + capsys.readouterr().err + (tmp_path / "failure-00000.json").read_text()


def test_files_of_a_run_are_their_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o022)
    try:
        private_files()
        rundir = RunDir(str(tmp_path / "run"))
        rundir.claim()
        rundir.write_resolved({"a": 1})
        rundir.start_metrics(0)
        rundir.append_metrics({"step": 1})
        rundir.close()
        for path in (tmp_path / "run").rglob("*"):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        monkeypatch.setenv("GEOLOOM_UMASK", "027")
        private_files()
        rundir.write("artifacts/x", b"")
        assert stat.S_IMODE((tmp_path / "run" / "artifacts" / "x").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_keys_and_fingerprints_do_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An access key called like our own tags once turned them into `***.config_fingerprint`."""
    tree = {"geoloom.tag": "geoloom here"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "geoloom")  # an identifier, no secret
    assert redact(tree) == tree
    before = config.fingerprint(PretrainConfig())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geoloom")
    assert redact(tree) == {"geoloom.tag": "*** here"}
    assert config.fingerprint(PretrainConfig()) == before
