"""The only way from this server to an address that a user wrote (and to the providers' own).

A `base_url` must never lead into the private network. So: https only, the host is resolved once,
every address of the answer must be public, the connection goes to exactly one of those addresses,
and no redirect is followed. What comes back is bounded in size and in time.

On sockets and h11 because httpcore2, around the same h11, logs the answer's headers at DEBUG, and
errors that quote a header of ours; nothing here logs. Environment proxies play no part.
"""

from __future__ import annotations

import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

import h11
import idna
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

IPAddress = IPv4Address | IPv6Address
Kind = Literal["refused", "timeout", "unreachable", "too_large", "redirect", "malformed"]

MAX_BYTES = 8 * 2**20
MAX_HEADER_BYTES = 64 * 2**10
MAX_URL_CHARACTERS = 2048
READ_BYTES = 64 * 2**10
DEFAULT_PORTS = {"http": 80, "https": 443}

# `ipaddress.is_global` won't do: Python 3.11.7 calls NAT64, 6to4, multicast and more global.
GLOBAL_UNICAST = IPv6Network("2000::/3")  # RFC 4291 2.4, IANA: nothing else is assigned
NOT_PUBLIC = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # RFC 1122 3.2.1.3: this network
        "10.0.0.0/8",  # RFC 1918: private
        "100.64.0.0/10",  # RFC 6598: carrier-grade NAT; Alibaba's metadata at 100.100.100.200
        "127.0.0.0/8",  # RFC 1122 3.2.1.3: loopback
        "168.63.129.16/32",  # no RFC: public in form, but Azure's wire server
        "169.254.0.0/16",  # RFC 3927: link-local; cloud metadata at 169.254.169.254
        "172.16.0.0/12",  # RFC 1918: private
        "192.0.0.0/24",  # RFC 6890: protocol assignments; Oracle's metadata at 192.0.0.192
        "192.0.2.0/24",  # RFC 5737: TEST-NET-1
        "192.31.196.0/24",  # RFC 7535: AS112, a nearby sink
        "192.52.193.0/24",  # RFC 7450: multicast tunnel relays
        "192.88.99.0/24",  # RFC 7526: 6to4 relay anycast
        "192.168.0.0/16",  # RFC 1918: private
        "192.175.48.0/24",  # RFC 7534: AS112, a nearby sink
        "198.18.0.0/15",  # RFC 2544: benchmarks
        "198.51.100.0/24",  # RFC 5737: TEST-NET-2
        "203.0.113.0/24",  # RFC 5737: TEST-NET-3
        "224.0.0.0/4",  # RFC 5771: multicast
        "240.0.0.0/4",  # RFC 1112 4: reserved
        "255.255.255.255/32",  # RFC 919: broadcast
        "::/128",  # RFC 4291 2.5.2: unspecified
        "::1/128",  # RFC 4291 2.5.3: loopback
        "::/96",  # RFC 4291 2.5.5.1: IPv4-compatible
        "::ffff:0:0/96",  # RFC 4291 2.5.5.2: IPv4-mapped
        "64:ff9b::/96",  # RFC 6052: NAT64
        "64:ff9b:1::/48",  # RFC 8215: NAT64, local
        "100::/64",  # RFC 6666: discard
        "100:0:0:1::/64",  # RFC 9780: dummy
        "2001::/32",  # RFC 4380: Teredo
        "2001::/23",  # RFC 2928: protocol assignments
        "2001:db8::/32",  # RFC 3849: documentation
        "2002::/16",  # RFC 3056: 6to4
        "2620:4f:8000::/48",  # RFC 7534: AS112, a nearby sink
        "3fff::/20",  # RFC 9637: documentation
        "5f00::/16",  # RFC 9602: SRv6 segments
        "fc00::/7",  # RFC 4193: unique local; cloud metadata at fd00:ec2::254
        "fe80::/10",  # RFC 4291 2.5.6: link-local
        "fec0::/10",  # RFC 3879: site-local
        "ff00::/8",  # RFC 4291 2.7: multicast
    )
)

# Stricter than urlsplit, which drops line breaks and finds a host in nearly anything. Zone ids,
# percent signs, user names, backslashes and fragments fit nowhere. ASCII: "ſ" is no "s".
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[^\s/?#@:\[\]\\%]+))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>[/?][!-\"$-\[\]-~]*)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# What inet_aton, and so getaddrinfo, may take for an IPv4 address: 2130706433, 0x7f.1, 127.1.
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


class EgressError(Exception):
    """Why there is no answer. ``message`` is a sentence for the owner, without key or body.

    ``kind``: "refused" (by policy; nothing was connected), "timeout", "unreachable" (DNS, connect,
    TLS, or broken off), "too_large", "redirect", "malformed" (not HTTP, or not what was asked for).
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(kind, message)  # both, so that it survives pickling
        self.kind: Kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Answer:
    """``headers`` have lower-case names. Its repr shows no more than the status."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart: ``host`` is normalised and without brackets, ``path`` has the query."""

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)
    allowed: bool = False  # by settings.EGRESS_ALLOWED_ORIGINS

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


# --- What may be called ----------------------------------------------------------------------


def is_public(address: IPAddress) -> bool:
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    return not any(address in network for network in NOT_PUBLIC)


def _normalise(name: str) -> str | None:
    """The host name as DNS knows it, or an IPv4 address; None where it is neither.

    Unicode goes first: "①②⑦.⓪.⓪.①" is an address, and "127。0。0。1" has dots.
    """
    try:
        host = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode()
    except UnicodeError:
        return None
    host = host.removesuffix(".")
    if len(host) > 253 or not _HOST.fullmatch(host):
        return None
    if _ENDS_IN_NUMBER.fullmatch(host):
        try:
            return str(IPv4Address(host))  # four decimal numbers, and no other spelling
        except ValueError:
            return None
    return host


def _parse(url: str) -> Target:
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
    if match is None:
        raise EgressError(
            "refused",
            "The address must look like https://host:port/path, without user name, password"
            " or fragment.",
        )
    scheme = match["scheme"].lower()
    port = int(match["port"] or DEFAULT_PORTS[scheme])
    host: str | None = None
    if match["name"]:
        host = _normalise(match["name"])
    else:
        try:
            host = str(IPv6Address(match["ipv6"]))
        except ValueError:
            host = None
    if host is None or not 0 < port < 65536:
        raise EgressError("refused", "The address names no valid host or port.")
    path = match["path"] or "/"
    return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")


@lru_cache(maxsize=4)
def _allowed_origins(urls: tuple[str, ...]) -> frozenset[tuple[str, str, int]]:
    try:
        targets = [_parse(url) for url in urls]
    except EgressError as error:
        raise ImproperlyConfigured(f"EGRESS_ALLOWED_ORIGINS: {error}") from None
    if any(target.path != "/" for target in targets):
        raise ImproperlyConfigured("EGRESS_ALLOWED_ORIGINS: an origin has no path.")
    return frozenset(target.origin for target in targets)


def check_url(url: str) -> Target:
    """What of the policy needs no network. Raises EgressError of kind "refused"."""
    target = _parse(url)
    if target.origin in _allowed_origins(tuple(settings.EGRESS_ALLOWED_ORIGINS)):
        return replace(target, allowed=True)
    if target.scheme != "https":
        raise EgressError("refused", "The address must begin with https://.")
    try:
        literal = ip_address(target.host)
    except ValueError:
        return target
    _require_public(target, [literal])
    return target


def _require_public(target: Target, addresses: list[IPAddress]) -> None:
    # All of them, and none is named: the answer must not map the private network.
    if not target.allowed and not all(map(is_public, addresses)):
        raise EgressError("refused", f"{target.host} is not a public internet address.")


# --- The call --------------------------------------------------------------------------------


def resolve(host: str, port: int) -> list[str]:
    """Every address of ``host``, in order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


def get(
    url: str, headers: Mapping[str, str], *, deadline: float, max_bytes: int = MAX_BYTES
) -> Answer:
    """GET ``url``; all of it is over by ``deadline`` (of time.monotonic). Raises EgressError."""
    return _call("GET", url, headers, b"", deadline, max_bytes)


def post(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    deadline: float,
    max_bytes: int = MAX_BYTES,
) -> Answer:
    """POST ``body`` to ``url``, under the same rules as ``get``. Raises EgressError."""
    length = {"content-length": str(len(body))}
    return _call("POST", url, {**headers, **length}, body, deadline, max_bytes)


def _call(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    deadline: float,
    max_bytes: int,
) -> Answer:
    target = check_url(url)
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
    request = _request(connection, method, target, headers, body)
    try:
        with _connect(target, deadline) as tcp, _secured(tcp, target, deadline) as sock:
            sock.settimeout(_left(deadline))
            sock.sendall(request)
            return _receive(sock, connection, deadline, max_bytes)
    except TimeoutError:
        error = EgressError("timeout", f"{target.host} did not answer in time.")
    except ssl.SSLCertVerificationError:
        error = EgressError("unreachable", f"{target.host} has no valid certificate for that name.")
    except OSError:
        error = EgressError("unreachable", f"{target.host} can't be reached, or broke off.")
    except h11.RemoteProtocolError as problem:
        if problem.error_status_hint == 431:
            error = EgressError("too_large", f"{target.host} sent headers without end.")
        elif connection.trailing_data[1]:
            error = EgressError("unreachable", f"{target.host} broke off its answer.")
        else:
            error = EgressError("malformed", f"{target.host} does not answer in HTTP.")
    # Here, not above: the error that led to this one may quote the answer, and goes with nobody.
    raise error


def _left(deadline: float) -> float:
    """Seconds until ``deadline``; TimeoutError where none is left."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _request(
    connection: h11.Connection,
    method: str,
    target: Target,
    headers: Mapping[str, str],
    body: bytes,
) -> bytes:
    ours = {"host": target.authority, "accept-encoding": "identity", "connection": "close"}
    theirs = {name.lower(): value for name, value in headers.items()}
    try:
        event = h11.Request(
            method=method,
            target=target.path,
            headers=list(({"user-agent": "ModelSwapper"} | theirs | ours).items()),
        )
        content = [h11.Data(body)] if body else []
        parts = [connection.send(part) for part in (event, *content, h11.EndOfMessage())]
        return b"".join(part or b"" for part in parts)
    except (h11.LocalProtocolError, UnicodeError):
        pass
    # Outside, because those errors quote the header, which is a key.
    raise EgressError("refused", "The key has characters that can't be sent.")


@lru_cache(maxsize=4)
def _tls_context(ca_file: str) -> ssl.SSLContext:
    """Verifies certificate and host name; trusts the system's authorities and ``ca_file``'s."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            raise ImproperlyConfigured(f"EGRESS_CA_FILE can't be used: {error}") from None
    return context


def _addresses(target: Target, deadline: float) -> list[IPAddress]:
    """The only time that the host is resolved. Raises EgressError unless all may be called.

    In a thread of its own, because getaddrinfo knows no timeout. One that hangs ends with the
    resolver's patience; in a pool it would keep others waiting, and the process from ending.
    """
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(resolve(target.host, target.port))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    addresses = [ip_address(text) for text in answer]
    _require_public(target, addresses)
    return addresses


def _connect(target: Target, deadline: float) -> socket.socket:
    """Connect to the first address that takes it. Each has its share of the time that is left."""
    addresses = _addresses(target, deadline)
    problem: OSError = ConnectionError("no address")
    for position, address in enumerate(addresses):
        try:
            share = _left(deadline) / (len(addresses) - position)
            return _connect_to(address, target.port, share)
        except OSError as error:
            problem = error
    raise problem


def _connect_to(address: IPAddress, port: int, timeout: float) -> socket.socket:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect((str(address), port))
    except OSError:
        sock.close()
        raise
    return sock


def _secured(tcp: socket.socket, target: Target, deadline: float) -> socket.socket:
    """TLS over ``tcp`` for the name that was asked for, whatever address it has."""
    if target.scheme == "http":
        return tcp
    tcp.settimeout(_left(deadline))  # for the handshake as a whole
    return _tls_context(settings.EGRESS_CA_FILE).wrap_socket(tcp, server_hostname=target.host)


def _receive(
    sock: socket.socket, connection: h11.Connection, deadline: float, max_bytes: int
) -> Answer:
    status, headers, body = 0, dict[str, str](), bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            sock.settimeout(_left(deadline))
            connection.receive_data(sock.recv(READ_BYTES))
            # h11 would wait for a header's end, and an SSH server for us.
            if not status and not b"HTTP/".startswith(connection.trailing_data[0][:5]):
                raise EgressError("malformed", "What answers there is not an HTTP server.")
        elif isinstance(event, h11.Response):
            status = event.status_code
            for raw_name, raw_value in event.headers:
                name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
            if 300 <= status < 400:
                raise EgressError(
                    "redirect",
                    f"The server redirects elsewhere (status {status}), which is not followed:"
                    " enter the final address.",
                )
            # Never decompressed: a small one may hold a body of any size.
            if headers.get("content-encoding", "").lower() not in ("", "identity"):
                raise EgressError("malformed", "The answer is compressed, which was not asked for.")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise EgressError("too_large", f"The answer is larger than {max_bytes:,} bytes.")
        elif isinstance(event, h11.EndOfMessage):
            return Answer(status, headers, bytes(body))
