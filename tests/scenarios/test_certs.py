"""`python -m scenarios.certs`: what it makes, says, and refuses."""

from __future__ import annotations

import argparse
import ssl
from pathlib import Path

import pytest

from backends.net.tls import CertificateError, Tls
from scenarios.certs import Authority, HostError, OutError, check, host_name, main, make, owner_name
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


def believed(mine: Path, theirs: Path) -> bool:
    """Whether a worker and an owner speak with each other."""
    worker, owner = Tls(mine).context(server=True), Tls(theirs).context(server=False)
    there, here = (ssl.MemoryBIO() for _ in range(2))
    ends = (
        worker.wrap_bio(there, here, server_side=True),
        owner.wrap_bio(here, there, server_hostname="gpu.example"),
    )
    done: set[int] = set()
    for _ in range(8):
        for i in {0, 1} - done:
            try:
                ends[i].do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
            done.add(i)
    return len(done) == 2


def test_a_kept_authority_signs_for_owners_and_workers_that_come_later(tmp_path: Path) -> None:
    """Each is told apart, all are believed; made is what was named, and its key is its own."""
    kept, out = tmp_path / "authority", tmp_path / "certs"
    said = make(out, ["gpu.example"], 30, ["ann", "bob"], kept)
    assert f"\nTo bob alone: {out / 'bob'}\n" in said
    assert make(out, [], 3000, ["carol"], kept).count("identity") == 1
    make(tmp_path / "b", ["gpu.example"], 30, [], kept)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["worker"]
    owners = [out / name for name in ("ann", "bob", "carol")]
    for worker in (out / "worker", tmp_path / "b" / "worker"):
        assert all(believed(worker, owner) for owner in owners)
    assert len({check(owner, []).split()[-1] for owner in owners}) == 3
    assert "29 days from now" in check(out / "carol", [])  # no longer than who signed it
    make(tmp_path / "other", [], 30, ["dora"], tmp_path / "stranger")
    assert not believed(out / "worker", tmp_path / "other" / "dora")
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
    with pytest.raises(OutError, match="bob is there already"):
        make(out, [], 30, ["eve", "bob"], kept)
    assert not (out / "eve").exists()


def test_an_authority_that_cannot_be_used(tmp_path: Path) -> None:
    """Nothing there, another's key, one that others can read, one that has expired."""
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(CertificateError, match="holds no authority"):
        Authority(30, kept)
    for name, days in (("good", 30), ("other", 30), ("old", -0.5)):
        Authority(days, tmp_path / name)
    with pytest.raises(CertificateError, match="old has expired"):
        Authority(30, tmp_path / "old")
    (tmp_path / "good/key.pem").chmod(0o640)
    with pytest.raises(CertificateError, match="chmod 600"):
        Authority(30, tmp_path / "good")
    (tmp_path / "other/ca.pem").write_bytes((tmp_path / "good/ca.pem").read_bytes())
    with pytest.raises(CertificateError, match=r"not the key of ca\.pem"):
        Authority(30, tmp_path / "other")


@pytest.mark.parametrize("text", ["", "worker", "../ann", "a b", "-x"])
def test_what_is_no_owner(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="letters, digits"):
        owner_name(text)


def test_a_command_makes_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides without an authority; with one, the owners or the worker that it is told."""
    for arguments, there in (
        ([], {"owner", "worker"}),
        (["--owner", "ann"], {"ann", "worker"}),
        (["--authority", "kept"], {"owner", "worker"}),
        (["--authority", "kept", "--owner", "ann"], {"ann"}),
        (["--authority", "kept", "--name", "gpu.example"], {"worker"}),
    ):
        out = tmp_path / "-".join(["out", *arguments])
        options = [str(tmp_path / "kept") if text == "kept" else text for text in arguments]
        monkeypatch.setattr("sys.argv", ["certs", "--out", str(out), *options])
        main()
        assert {path.name for path in out.iterdir()} == there
