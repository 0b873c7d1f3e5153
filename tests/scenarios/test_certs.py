"""`python -m scenarios.certs`: what it makes, says, and refuses."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from backends.net.tls import CertificateError
from scenarios.certs import Authority, HostError, OutError, check, host_name, make
from tests.scenarios.commands import run


def test_what_is_made_is_what_a_user_asked_for(tmp_path: Path) -> None:
    """Both sides, with the names asked for, for their owner's eyes only; how to copy them."""
    said = make(tmp_path / "certs", ["gpu.example", "203.0.113.7", "2001:db8::1"], 30)
    assert "a worker at gpu.example, 203.0.113.7, 2001:db8::1" in said
    assert "29 days from now" in said
    assert f"tar -C {tmp_path}/certs -c worker | ssh gpu.example" in said
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "certs").rglob("*") if p.is_file()}
    assert modes == {0o600}
    assert {(tmp_path / "certs" / s).stat().st_mode & 0o777 for s in ("owner", "worker")} == {0o700}
    check(tmp_path / "certs" / "worker", ["203.0.113.7", "2001:db8::1"])
    with pytest.raises(OutError, match="there already"):
        make(tmp_path / "certs", ["gpu.example"], 30)


def test_a_check_fails_where_a_connection_would(tmp_path: Path) -> None:
    """Another host, an owner's, an expired one, a key that others can read."""
    Authority().issue(tmp_path / "worker", ["gpu.example"])
    with pytest.raises(HostError, match=r"not name box\.example: it names gpu\.example"):
        check(tmp_path / "worker", ["box.example"])
    Authority().issue(tmp_path / "owner")
    with pytest.raises(HostError, match="no host at all, as an owner's does"):
        check(tmp_path / "owner", ["gpu.example"])
    (tmp_path / "owner" / "key.pem").chmod(0o640)
    with pytest.raises(CertificateError, match="chmod 600"):
        check(tmp_path / "owner", [])
    Authority(-0.5).issue(tmp_path / "old", ["gpu.example"])
    with pytest.raises(CertificateError, match="has expired"):
        check(tmp_path / "old", [])
    text = run("scenarios.certs", "--check", str(tmp_path / "old"), code=1)
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "gpu.example:7", "https://gpu.example", "a b", "-x", "a..b"])
def test_what_is_no_name(text: str) -> None:
    """Said before anything is made."""
    with pytest.raises(argparse.ArgumentTypeError, match="without a port"):
        host_name(text)
    assert host_name("GPU.example.") == "GPU.example"
    assert host_name("2001:DB8::1") == "2001:db8::1"
