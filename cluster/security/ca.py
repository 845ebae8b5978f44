"""A cluster's CA, kept by the side that launches: makes it, issues certificates of nodes or hosts, replaces it.

A CA is replaced in steps, and no step breaks a connection: :func:`rotate` makes a new one beside the old; what it
returns goes to every host first; then each gets a certificate of the new CA (:func:`issue`); when all have one,
the newest alone goes to every host, and certificates of the old CA are refused from then on; :func:`retire` ends it.
"""

import ipaddress
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.rundir import ClusterFault
from tracehaul.runtime import kept
from tracehaul.runtime.credentials import NAME_SCHEME
from tracehaul.runtime.durable import write_whole

CA_DAYS = 3650
LEAF_DAYS = 90
BACKDATED = timedelta(days=1)
"""For hosts whose clocks are behind."""
AUTHORITY_FILE = "authority.pem"
"""The CA's key, its certificate, and behind it that of the one before, while that is still trusted."""
LOCK_WAIT_S = 10.0
NAME_CHARS_MAX = 64
"""Of a certificate's subject."""


class Issued(NamedTuple):
    """What a host needs: all PEM."""

    cert: bytes
    key: bytes
    ca: bytes
    """The CAs that it trusts: one, or two while the CA is replaced."""


class _Authority(NamedTuple):
    key: ec.EllipticCurvePrivateKey
    certificates: list[x509.Certificate]
    """Trusted ones; the first is the key's."""


def ensure_ca(folder: Path, cluster: str, *, now_s: float) -> bytes:
    """The certificates that members of ``cluster`` trust; its CA is made if ``folder`` has none.

    Raises:
        ClusterFault: the folder cannot be used, or holds another cluster's CA.
    """
    with _locked(folder):
        if not (folder / AUTHORITY_FILE).exists():
            _write(folder, _make(cluster, now_s, []))
        authority = _read(folder)
    owner = _organization(authority.certificates[0])
    if owner != cluster:
        raise ClusterFault(f"{folder} holds the CA of cluster {owner}, not of {cluster}")
    return _bundle(authority)


def rotate(folder: Path, *, now_s: float) -> bytes:
    """Make a new CA, trusted beside the present one; returns both, for every host.

    Raises:
        ClusterFault: there is no CA, or the last replacement has not ended.
    """
    with _locked(folder):
        authority = _read(folder)
        if len(authority.certificates) > 1:
            raise ClusterFault(f"the CA in {folder} is being replaced already: retire the old one first")
        fresh = _make(_organization(authority.certificates[0]), now_s, authority.certificates)
        _write(folder, fresh)
    return _bundle(fresh)


def trusted(folder: Path) -> list[bytes]:
    """The CAs that are trusted now, each as PEM, the newest first: two while it is being replaced.

    Raises:
        ClusterFault: there is no CA.
    """
    return [cert.public_bytes(serialization.Encoding.PEM) for cert in _read(folder).certificates]


def retire(folder: Path) -> bytes:
    """Trust the newest CA alone; returns it, for every host.

    Raises:
        ClusterFault: there is no CA.
    """
    with _locked(folder):
        authority = _read(folder)
        authority = authority._replace(certificates=authority.certificates[:1])
        _write(folder, authority)
    return _bundle(authority)


def issue(
    folder: Path, name: str, addresses: Sequence[str], *, now_s: float, nodes: Sequence[str] = (), days: int = LEAF_DAYS
) -> Issued:
    """A new key with a certificate of the newest CA.

    ``name``: of the node, or of a host that has ``nodes``. ``addresses``: where others reach it, IP addresses or names.

    Raises:
        ClusterFault: there is no CA, or a name cannot stand in a certificate.
    """
    authority = _read(folder)
    if not 0 < len(name) <= NAME_CHARS_MAX:
        raise ClusterFault(f"not a name for a certificate (1 to {NAME_CHARS_MAX} characters): {name!r}")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(_organization(authority.certificates[0]), name)
    try:
        others: list[x509.GeneralName] = [_address(address) for address in addresses]
        others += [x509.UniformResourceIdentifier(NAME_SCHEME + node) for node in nodes or (name,)]
    except ValueError as error:
        raise ClusterFault(f"{name}: cannot stand in a certificate: {error}") from error
    issuer = authority.certificates[0]
    builder = _builder(subject, issuer.subject, key.public_key(), authority.key.public_key(), now_s, days)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName(others), critical=False)
    )
    cert = builder.sign(authority.key, hashes.SHA256())
    return Issued(cert.public_bytes(serialization.Encoding.PEM), _key_pem(key), _bundle(authority))


def _make(cluster: str, now_s: float, before: list[x509.Certificate]) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own each: a chain is built by names first.
    subject = _subject(cluster, f"{cluster[: NAME_CHARS_MAX // 2]} CA {secrets.token_hex(4)}")
    builder = (
        _builder(subject, subject, key.public_key(), key.public_key(), now_s, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
    )
    return _Authority(key, [builder.sign(key, hashes.SHA256()), *before])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuers: ec.EllipticCurvePublicKey,
    now_s: float,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.fromtimestamp(now_s, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(cluster: str, name: str) -> x509.Name:
    try:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
    except ValueError as error:
        raise ClusterFault(f"{cluster} / {name}: cannot stand in a certificate: {error}") from error


def _address(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _organization(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)


def _bundle(authority: _Authority) -> bytes:
    return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in authority.certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(folder: Path, authority: _Authority) -> None:
    try:
        write_whole(folder / AUTHORITY_FILE, _key_pem(authority.key) + _bundle(authority), private=True)
    except OSError as error:
        raise ClusterFault(f"the CA cannot be kept in {folder}: {error}") from error


def _read(folder: Path) -> _Authority:
    path = folder / AUTHORITY_FILE
    try:
        data = path.read_bytes()
        key = serialization.load_pem_private_key(data, None)
        certificates = x509.load_pem_x509_certificates(data)
    except FileNotFoundError:
        raise ClusterFault(f"there is no CA in {folder}") from None
    except (OSError, ValueError) as error:
        raise ClusterFault(f"{path} cannot be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificates[0].public_key() != key.public_key():
        raise ClusterFault(f"{path} cannot be used: its key is not that of its first certificate")
    return _Authority(key, certificates)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with kept.alone(folder / "lock", LOCK_WAIT_S) as got:
            if not got:
                raise ClusterFault(f"another command holds {folder / 'lock'}")
            yield
    except OSError as error:
        raise ClusterFault(f"the CA cannot be kept in {folder}: {error}") from error
