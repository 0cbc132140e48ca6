"""Google's real clients (TensorFlow's, Orbax's, google-cloud-storage) against a bucket on the loopback.

They know no other host than Google's own: here its names lead to this machine, in a mount namespace with an /etc/hosts
of its own, and a certificate made for the test is trusted. Needs root, unshare, and port 443.
"""

import contextlib
import datetime
import os
import shutil
import socket
import subprocess

import pytest

from benchmarks.quick_compile import XLA_FLAGS
from tests.support.bucket import Bucket

_HOSTS = ("storage.googleapis.com", "www.googleapis.com", "oauth2.googleapis.com")


@contextlib.contextmanager
def real_clients(folder, scratch):
    """Yields (the Bucket that Google's clients see, the beginning of a command that sees it, its environment).

    Skips the test if that cannot be. TensorStore is told another address, of a Bucket of the same folder.
    """
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip("cryptography")
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs root, and a mount namespace of its own")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 443))
        except OSError:
            pytest.skip("port 443 is taken")
    certificate, key = _certificate(scratch)
    hosts = scratch / "hosts"
    hosts.write_text("127.0.0.1 localhost " + " ".join(_HOSTS) + "\n")
    enter = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
    with Bucket(folder) as plain, Bucket(folder, port=443, cert=(certificate, key)) as secure:
        names = ("CURL_CA_BUNDLE", "TENSORSTORE_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
        env = os.environ | plain.environment | dict.fromkeys(names, str(certificate))
        env |= dict(NO_GCE_CHECK="true", STORAGE_EMULATOR_HOST="https://storage.googleapis.com", JAX_PLATFORMS="cpu")
        env["XLA_FLAGS"] = XLA_FLAGS
        yield secure, ["unshare", "-m", "bash", "-c", enter, "bash"], env


def _certificate(scratch):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _HOSTS[0])])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in _HOSTS]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = made.sign(key, hashes.SHA256())
    files = scratch / "certificate.pem", scratch / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return files
