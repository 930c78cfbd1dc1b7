"""A machine without a home, a user that it does not know, and proxies: as in containers and on clusters."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine import Driver, table

from sparsemem.cli import main
from sparsemem.study.engines.ray_engine import home_or, offer_token, past_proxies


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: Any) -> Any:
        raise KeyError(f"uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_home_is_told_where_to_keep_texts(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SPARSEMEM_CACHE", raising=False)
    assert main(["run", str(write_study()), "--results", str(tmp_path / "runs")]) == 2
    assert (
        "there is no home folder to keep prepared texts in; set SPARSEMEM_CACHE to a folder" in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("home", [None, "file/home", "file"])
def test_ray_has_a_home_where_the_user_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    (tmp_path / "file").touch()  # below a file even root makes no folder
    if home:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    offer_token()
    with home_or(tmp_path):
        assert os.environ["HOME"] == str(tmp_path)
    assert os.environ.get("HOME") == (str(tmp_path / home) if home else None)


def test_a_home_that_can_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with home_or(tmp_path / "other"):
        assert os.environ["HOME"] == str(tmp_path)


def test_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org,localhost")
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = past_proxies()
    assert found["no_proxy"] == "example.org,localhost,127.0.0.1,::1"
    assert found["NO_PROXY"] == found["no_grpc_proxy"] == "127.0.0.1,localhost,::1"


@pytest.mark.slow
def test_a_dead_proxy_and_a_missing_home_do_not_keep_ray_from_a_study(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_grpc_enable_http_proxy", "1")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code, _, err = start(write_study(vary={"rho": [1.0]}), "ray", tmp_path / "runs").end()
    assert code == 0, err
    assert [row["status"] for row in table(tmp_path / "runs" / "tiny")] == ["finished"]
