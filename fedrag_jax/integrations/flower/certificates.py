"""Makes certificates for a server and keys for parties, without an existing authority."""

import datetime
import ipaddress
import os
import pathlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedrag_jax.errors import ConfigError
from fedrag_jax.files import writing

CA, CERTIFICATE, KEY = "ca.crt", "server.pem", "server.key"
VALID = datetime.timedelta(days=365)


def make_certificates(folder: pathlib.Path, hosts: Sequence[str]) -> None:
    """Writes `ca.crt` for the parties, and `server.pem` and `server.key`, which stay at the server.

    The authority's own key is not saved. After a year the certificate expires: make all files again.

    Args:
      hosts: names and addresses at which parties reach the server.

    Raises:
      ConfigError: the folder cannot be written; as `require_hosts`.
    """
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = (_name(name) for name in ("fedrag federation", "fedrag server"))
    root = (
        _begun(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signing_certificates=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        _begun(subject, issuer, server.public_key())
        .add_extension(x509.SubjectAlternativeName([*map(_alternative, hosts)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signing_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(authority, hashes.SHA256())
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CA).write_bytes(root.public_bytes(serialization.Encoding.PEM))
        (folder / CERTIFICATE).write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    _write_secret(
        folder / KEY,
        server.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def require_hosts(hosts: Sequence[str]) -> None:
    """Checks names and addresses of a server.

    Raises:
      ConfigError: one that is neither.
    """
    for host in hosts:
        _alternative(host)


def make_node_key(path: pathlib.Path) -> None:
    """Writes the key that identifies a party's node: `path`, which is secret, and `path`.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            + b"\n"
        )
    _write_secret(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )


def _write_secret(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that only its owner can read, from the first byte on."""
    with writing(path):
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)


def _begun(subject: x509.Name, issuer: x509.Name, key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + VALID)
    )


def _usage(signing_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signing_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signing_certificates,
        crl_sign=signing_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    if not host.strip():
        raise ConfigError(f"{host!r} is neither a name nor an address of a server: give one")
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except ValueError as error:  # also of encoding
        raise ConfigError(
            f"{host!r} is neither a name nor an address of a server: {error}"
        ) from error
