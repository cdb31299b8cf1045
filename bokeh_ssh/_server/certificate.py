"""What a browser will say to a server's certificate at ``localhost``, in words. Text only."""

from __future__ import annotations

import datetime
import warnings

from cryptography import x509

from bokeh_ssh._core.text import clean

_LONGEST = 100  # characters of a name


def describe_certificate(der: bytes) -> str:
    """Return what a browser objects to, or who must be trusted for it not to object."""
    try:
        with warnings.catch_warnings():  # of what is not quite as the standard has it
            warnings.simplefilter("ignore")
            return _describe(x509.load_der_x509_certificate(der))
    except (ValueError, TypeError, x509.UnsupportedGeneralNameType):
        return "the browser will warn: its certificate cannot be read"


def _describe(certificate: x509.Certificate) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    faults = []
    if certificate.issuer == certificate.subject:
        faults.append("is self-signed")
    names = _names(certificate)
    if "localhost" not in names:
        made_for = ", ".join(clean(name, _LONGEST) for name in names[:3])
        faults.append(f"is made for {made_for or 'no name'}, not for localhost")
    if certificate.not_valid_after_utc < now:
        faults.append(f"has expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if certificate.not_valid_before_utc > now:
        faults.append(f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}")
    if faults:
        return f"the browser will warn: its certificate {', and '.join(faults)}"
    issuer = clean(certificate.issuer.rfc4514_string(), _LONGEST)
    return f"the browser has to trust who has issued its certificate, {issuer}"


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:  # browsers look nowhere else
        return []
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return names.get_values_for_type(x509.DNSName) + addresses
