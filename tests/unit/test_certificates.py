"""Certificates: every mistake named by its key, reloads that keep what works, and the manual's examples."""

from __future__ import annotations

import logging
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
import trustme

from config.loader import ConfigError, load
from config.schema import Listen, Upstream
from proxy.net.certificates import CertificateError, for_clients, for_server, problems
from tests.integration.certificates import Authority, Issued
from tests.unit.test_cli import run

MANUAL = Path(__file__).parent.parent.parent / "docs" / "tls.md"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def issued(authority: Authority) -> Issued:
    return authority.issue("localhost")


def listen(cert: Path, key: Path | None, ca: Path | None = None) -> Listen:
    return Listen(tls_cert=cert, tls_key=key, tls_ca=ca, tls_mode="verify-ca" if ca else None)


class TestFiles:
    def test_a_missing_file(self, issued: Issued, tmp_path: Path) -> None:
        with pytest.raises(
            CertificateError, match=r"listen.tls_cert: .*none.crt cannot be read: No such file"
        ):
            for_clients(listen(tmp_path / "none.crt", issued.key))
        with pytest.raises(
            CertificateError, match=r"listen.tls_key: .*none.key cannot be read: No such file"
        ):
            for_clients(listen(issued.cert, tmp_path / "none.key"))
        with pytest.raises(CertificateError, match=r"upstream.sslrootcert: .*none.crt cannot be read"):
            for_server(Upstream(sslrootcert=tmp_path / "none.crt"))

    def test_a_key_of_another_certificate(self, authority: Authority, issued: Issued) -> None:
        other = authority.issue("localhost")
        with pytest.raises(
            CertificateError, match=r"listen.tls_key: .* is not the key of the certificate in"
        ):
            for_clients(listen(issued.cert, other.key))
        with pytest.raises(CertificateError, match=r"upstream.sslkey: .* is not the key of the certificate"):
            for_server(Upstream(sslcert=issued.cert, sslkey=other.key))

    def test_no_key(self, issued: Issued) -> None:
        with pytest.raises(CertificateError, match=r"tls_key: .* holds no private key .* name the file"):
            for_clients(listen(issued.cert, None))

    def test_what_is_not_pem(self, issued: Issued, tmp_path: Path) -> None:
        junk = tmp_path / "junk"
        junk.write_bytes(b"\x30\x82")
        with pytest.raises(CertificateError, match=r"tls_cert: .* holds no certificate in PEM format"):
            for_clients(listen(junk, issued.key))
        with pytest.raises(CertificateError, match=r"tls_key: .* holds no private key in PEM format"):
            for_clients(listen(issued.cert, junk))
        with pytest.raises(CertificateError, match=r"tls_ca: .* holds no certificate in PEM format"):
            for_clients(listen(issued.cert, issued.key, junk))

    def test_a_passphrase(self, issued: Issued, tmp_path: Path) -> None:
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
        protected = tmp_path / "protected.key"
        protected.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"x"),
            )
        )
        with pytest.raises(CertificateError, match=r"tls_key: .* is protected by a passphrase"):
            for_clients(listen(issued.cert, protected))

    def test_certificate_and_key_in_one_file(self, issued: Issued, tmp_path: Path) -> None:
        both = tmp_path / "both.pem"
        both.write_bytes(issued.key.read_bytes() + issued.cert.read_bytes())
        assert for_clients(listen(both, None)) is not None

    def test_a_key_that_everybody_can_read_is_warned_of(
        self, issued: Issued, caplog: pytest.LogCaptureFixture
    ) -> None:
        issued.key.chmod(0o644)
        with caplog.at_level(logging.WARNING):
            for_clients(listen(issued.cert, issued.key))
        assert "others can read" in caplog.text


class TestReload:
    def test_nothing_happens_while_nothing_changes(self, issued: Issued) -> None:
        keeper = for_clients(listen(issued.cert, issued.key))
        assert keeper is not None
        before = keeper.current
        assert not keeper.refresh()
        assert keeper.current is before
        assert keeper.refresh(asked=True)

    def test_a_bad_file_is_said_once_and_the_old_certificate_stays(
        self, authority: Authority, issued: Issued, caplog: pytest.LogCaptureFixture
    ) -> None:
        keeper = for_clients(listen(issued.cert, issued.key))
        assert keeper is not None
        before = keeper.current
        other = authority.issue("localhost")
        shutil.copy(other.cert, issued.cert)
        with caplog.at_level(logging.INFO):
            assert not keeper.refresh()
            assert not keeper.refresh()
        assert keeper.current is before
        assert caplog.text.count("is not the key of the certificate") == 1
        shutil.copy(other.key, issued.key)
        assert keeper.refresh()
        assert keeper.current.end_point != before.end_point

    def test_the_channel_binding_is_that_of_the_certificate_shown(self, issued: Issued) -> None:
        import hashlib

        keeper = for_clients(listen(issued.cert, issued.key))
        assert keeper is not None
        pem = issued.cert.read_text().partition("-----END CERTIFICATE-----\n")
        der = ssl.PEM_cert_to_DER_cert(pem[0] + pem[1])
        assert keeper.current.end_point == hashlib.sha256(der).digest()


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('[listen]\ntls_mode = "require"', "listen.tls_mode", "needs a certificate: set listen.tls_cert"),
        ('[listen]\ntls_key = "k"', "listen.tls_key", "set listen.tls_cert"),
        ('[listen]\ntls_cert = "c"\ntls_mode = "verify-ca"', "listen.tls_mode", "set listen.tls_ca"),
        ('[listen]\ntls_cert = "c"\ntls_ca = "a"', "listen.tls_ca", 'use "verify-ca" or "verify-full"'),
        (f'[listen]\nunix_socket = "/{"x" * 100}"', "listen.unix_socket", "shorten it"),
        ('[listen]\nunix_socket_mode = "rwx"', "listen.unix_socket_mode", "should match pattern"),
        ('[upstream]\nsslmode = "verify-ca"', "upstream.sslmode", "set upstream.sslrootcert"),
        ('[upstream]\nsslmode = "require"\nsslrootcert = "system"', "upstream.sslmode", "too weak"),
        ('[upstream]\nhost = "/run"\nsslmode = "require"', "upstream.sslmode", "over a unix socket"),
        ('[upstream]\nsslkey = "k"', "upstream.sslkey", "set upstream.sslcert"),
        ('[upstream]\nsslmode = "disable"\nsslrootcert = "r"', "upstream.sslrootcert", "has no effect"),
        ('[upstream]\nsslnegotiation = "direct"', "upstream.sslnegotiation", '"require" or stronger'),
    ],
)
def test_what_cannot_work_is_said_by_key(text: str, key: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert [problem.key for problem in caught.value.problems] == [key]
    assert reason in str(caught.value)


def test_check_config_reads_the_files(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text('[listen]\ntls_cert = "server.crt"\n[upstream]\nsslrootcert = "root.crt"\n')
    code, _, error = run("check-config", "--config", str(path))
    assert code == 2
    assert f"listen.tls_cert: {tmp_path / 'server.crt'} cannot be read" in error
    assert f"upstream.sslrootcert: {tmp_path / 'root.crt'} cannot be read" in error


def test_the_systems_root_certificates_are_no_file() -> None:
    config = load(None, {"RUVECTOR_UPSTREAM_SSLROOTCERT": "system"})
    assert config.upstream.effective_sslmode == "verify-full"
    assert problems(config) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_examples_of_the_manual_hold(tmp_path: Path) -> None:
    text = MANUAL.read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, capture_output=True)
    trustme.CA().cert_pem.write_to_path(tmp_path / "root.crt")
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        path = tmp_path / "proxy.toml"
        path.write_text(example)
        assert problems(load(path, {})) == []
