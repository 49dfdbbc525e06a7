"""Egress: no URL and no name leads into the private network, and no server holds us up.

Every refusal is checked at a listener that stands where the URL points: it counts connections, and
a test of its own shows that it would have counted.
"""

from __future__ import annotations

import gzip
import ipaddress
import itertools
import logging
import pickle
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from django.core.exceptions import ImproperlyConfigured

from keys import egress
from keys.egress import EgressError

CANARY = "sk-CANARY-3f1b9c7a5d"
HEADERS = {"Authorization": f"Bearer {CANARY}"}
PUBLIC = "93.184.216.34"
OTHER_PUBLIC = "2606:4700:4700::1111"
SOON = 0.5  # a deadline, in seconds
GENEROUS = 5.0  # by then a call with that deadline is certainly over
Handler = Callable[[socket.socket], None]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


# --- The other side --------------------------------------------------------------------------


class Server:
    """Listens on a loopback address and hands each connection to ``handler`` in a thread."""

    def __init__(
        self, handler: Handler, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, 0), family=self.family)
        self.address, self.port = self.listener.getsockname()[:2]
        self.handler, self.tls = handler, tls
        self.clients: list[Any] = []
        self.probes: set[Any] = set()
        self.requests: list[bytes] = []
        self.over = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                conn, client = self.listener.accept()
            except OSError:
                return
            self.clients.append(client)
            threading.Thread(target=self.serve, args=(conn,), daemon=True).start()

    def serve(self, conn: socket.socket) -> None:
        conn.settimeout(10)
        with suppress(OSError), conn:
            stream = self.tls.wrap_socket(conn, server_side=True) if self.tls else conn
            with stream:
                self.handler(stream)

    def read_request(self, conn: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := conn.recv(65536)):
                break
            data += more
        self.requests.append(data)
        return data

    def count(self) -> int:
        """Connections so far, but ours: it comes last, so that no other is still in the queue."""
        with socket.create_connection((self.address, self.port)) as probe:
            self.probes.add(probe.getsockname())
            give_up = time.monotonic() + 10
            while probe.getsockname() not in self.clients:
                assert time.monotonic() < give_up, "the listener does not accept"
                time.sleep(0.001)
        return sum(client not in self.probes for client in self.clients)

    def close(self) -> None:
        self.over.set()
        # Or accept() goes on in its thread.
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start a server that sends ``parts``, or does what a function says with the connection."""
    servers: list[Server] = []

    def make(*parts: bytes, handler: Any = None, every: float = 0, **options: Any) -> Server:
        def send_parts(server: Server, conn: socket.socket) -> None:
            server.read_request(conn)
            for part in parts:
                conn.sendall(part)
                if every and server.over.wait(every):
                    return

        server = Server(lambda conn: (handler or send_parts)(server, conn), **options)
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.close()


def ok(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@pytest.fixture
def allow(settings: Any) -> Callable[[str], str]:
    def allow_origin(origin: str) -> str:
        settings.EGRESS_ALLOWED_ORIGINS = [*settings.EGRESS_ALLOWED_ORIGINS, origin]
        return origin

    return allow_origin


@dataclass
class Resolver:
    """Stands for DNS: answers by name, in turn, and the last one for ever."""

    answers: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        answers = self.answers.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    resolver = Resolver()
    monkeypatch.setattr(egress, "resolve", resolver)
    return resolver


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Addresses that are connected to. ``route(server)``: all connections go there instead."""
    real = socket.socket.connect

    class Connects(list[Any]):
        server: Server | None = None
        dead: tuple[str, ...] = ()
        timeouts: list[float | None] = []

        def route(self, server: Server, dead: tuple[str, ...] = ()) -> None:
            self.server, self.dead = server, dead

    seen = Connects()

    def connect(sock: socket.socket, address: Any) -> None:
        seen.append(address[:2])
        seen.timeouts = [*seen.timeouts, sock.gettimeout()]
        if seen.server is None or address[0] in seen.dead:
            raise ConnectionRefusedError
        real(sock, (seen.server.address, seen.server.port))

    monkeypatch.setattr(socket.socket, "connect", connect)
    return seen


@pytest.fixture(autouse=True)
def nothing_shows_the_key(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    for record in [*caplog.get_records("setup"), *caplog.get_records("call")]:
        shown = f"{record.getMessage()} {record.args!r} {record.exc_text}"
        assert CANARY not in shown


def get(url: str, within: float = GENEROUS, **options: Any) -> egress.Answer:
    options.setdefault("headers", HEADERS)
    return egress.get(url, deadline=time.monotonic() + within, **options)


def fails(url: str, within: float = GENEROUS, **options: Any) -> EgressError:
    """The error of a call that must fail, after looking for the key wherever it could show."""
    with pytest.raises(EgressError) as caught:
        get(url, within, **options)
    error = caught.value
    chain: list[BaseException] = [error]
    while linked := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(linked)
    text = "".join(traceback.format_exception(error))
    for one in chain:
        shown = f"{one} {one!r} {one.args!r} {vars(one)!r}"
        assert CANARY not in shown + text
    assert error.message.endswith(".") and str(error) == error.message
    return error


# --- What is refused -------------------------------------------------------------------------

# Where a port fits, it is the listener's: ":{port}".
HOSTILE = """
    https://127.0.0.1:{port}/  https://127.0.0.1.:{port}/  https://127.1:{port}/
    https://127.0.1:{port}/  https://127.255.255.254:{port}/  https://2130706433:{port}/
    https://017700000001:{port}/  https://0177.0.0.1:{port}/  https://0177.0.0.01:{port}/
    https://00127.0.0.1:{port}/  https://127.000.000.001:{port}/  https://0x7f000001:{port}/
    https://0x7F.0.0.1:{port}/  https://0x7f.1:{port}/  https://0x7f.0x0.0x0.0x1:{port}/
    https://127.0.0.0x1:{port}/  https://127.0.0.0x:{port}/  https://0x:{port}/
    https://127.0x0.01:{port}/  https://127.1.:{port}/  https://4294967295:{port}/
    https://6425673729:{port}/  https://383.0.0.1:{port}/  https://127.0.0.1.1:{port}/
    https://evil.127.1:{port}/  https://0:{port}/  https://0.0.0.0:{port}/  https://0.1:{port}/
    https://00:{port}/  https://0x0:{port}/

    https://①②⑦.⓪.⓪.①:{port}/  https://127。0。0。1:{port}/  https://127．0．0．1:{port}/
    https://127｡0｡0｡1:{port}/  https://１２７.0.0.1:{port}/  https://𝟙𝟚𝟟.𝟘.𝟘.𝟙:{port}/
    https://¹²⁷.⁰.⁰.¹:{port}/  https://０ｘ７ｆ.1:{port}/  https://0ₓ7f.1:{port}/
    https://２１３０７０６４３３:{port}/  https://٢.٣:{port}/  https://127.0.0.1。:{port}/
    https://1\u00ad27.0.0.1:{port}/  https://127.\u200b0.0.1:{port}/  https://［::1］:{port}/
    https://[：：1]:{port}/  https://example.com⁄@127.0.0.1:{port}/  https://a℀b:{port}/
    https://evil.example＠127.0.0.1:{port}/  https://127.0.0.1：{port}/  http\u017f://127.0.0.1:{port}/

    https://[::1]:{port}/  https://[0:0:0:0:0:0:0:1]:{port}/  https://[::0001]:{port}/
    https://[0000:0000:0000:0000:0000:0000:0000:0001]:{port}/  https://[::]:{port}/
    https://[::ffff:127.0.0.1]:{port}/  https://[::FFFF:7F00:1]:{port}/
    https://[0:0:0:0:0:ffff:7f00:0001]:{port}/  https://[::127.0.0.1]:{port}/
    https://[::7f00:1]:{port}/  https://[::ffff:0:127.0.0.1]:{port}/
    https://[64:ff9b::127.0.0.1]:{port}/  https://[64:ff9b:1::7f00:1]:{port}/
    https://[2002:7f00:1::]:{port}/  https://[2001:0:1::80ff:fffe]:{port}/
    https://[fe80::1]:{port}/  https://[fe80::1%eth0]:{port}/  https://[fe80::1%25lo]:{port}/
    https://[::1%25lo]:{port}/  https://[::1%lo]:{port}/  https://::1:{port}/  https://::1/
    https://[127.0.0.1]:{port}/  https://[::1:{port}/  https://::1]:{port}/  https://[]:{port}/
    https://[[::1]]:{port}/  https://[v1.127.0.0.1]:{port}/  https://[::1].:{port}/
    https://[::1]x:{port}/  https://x[::1]:{port}/

    https://127.0.0.1%00:{port}/  https://127.0.0.1%2e:{port}/  https://%31%32%37.0.0.1:{port}/
    https://127%2E0%2E0%2E1:{port}/  https://%6cocalhost:{port}/  https://127.0.0.1%23:{port}/
    https://user@127.0.0.1:{port}/  https://user:pass@127.0.0.1:{port}/
    https://@127.0.0.1:{port}/  https://:@127.0.0.1:{port}/
    https://example.com@127.0.0.1:{port}/  https://example.com:443@127.0.0.1:{port}/
    https://example.com#@127.0.0.1:{port}/  https://127.0.0.1:{port}#@example.com/
    https://127.0.0.1:{port}\\@example.com/  https://example.com\\@127.0.0.1:{port}/
    https:\\\\127.0.0.1:{port}/  https:/127.0.0.1:{port}/  https:127.0.0.1:{port}/
    https:///127.0.0.1:{port}/  ///127.0.0.1:{port}/  //127.0.0.1:{port}/  127.0.0.1:{port}
    https://127.0.0.1:{port}/#fragment  https://127.0.0.1:{port}:443/  https://127.0.0.1:０/
    https://127.0.0.1:0/  https://127.0.0.1:65536/  https://127.0.0.1:-1/  https://127.0.0.1:/
    https://127.0.0.1:{port}/\u00fc  https://a..127.0.0.1:{port}/  https://127.0.0.1..:{port}/
    https://.127.0.0.1:{port}/  https://.:{port}/  https://:{port}/  https://  https:///

    http://127.0.0.1:{port}/  HTTP://127.0.0.1:{port}/  http://example.com/  http://[::1]:{port}/
    ftp://127.0.0.1:{port}/  file:///etc/passwd  gopher://127.0.0.1:{port}/_  ws://127.0.0.1:{port}/
    unix:///run/x.sock  data:text/plain,x  jar:https://127.0.0.1:{port}/!/  https+unix://x/

    https://169.254.169.254/latest/meta-data/  https://2852039166/  https://0xa9fea9fe/
    https://0251.0376.0251.0376/  https://169.254.43518/  https://[::ffff:a9fe:a9fe]/
    https://[64:ff9b::a9fe:a9fe]/  https://[2002:a9fe:a9fe::]/  https://[fd00:ec2::254]/
    https://[FD00:EC2:0:0:0:0:0:254]/  https://[fd20:ce::254]/  https://100.100.100.200/
    https://1684301000/  https://168.63.129.16/  https://2822734096/  https://192.0.0.192/
    https://169.254.170.2/  https://１６９.254.169.254/
""".split()
# With what no split() would keep together.
HOSTILE += [
    "https://127.0.0.1:{port}/\r\nHost: x",
    "https://127.0.0.1:{port}/ ",
    " https://127.0.0.1:{port}/",
    "\x00https://127.0.0.1:{port}/",
    "https://127.0.0.1\t:{port}/",
    "https://127.0.\n0.1:{port}/",
    "ht\ntps://127.0.0.1:{port}/",
    "https://127.0.0.1 :{port}/",
    "https://127.0.0.1\x00.example.com:{port}/",
    "https://example.com\u2028@127.0.0.1:{port}/",
    "https://127.0.0.1\u3000:{port}/",
    "https://127.0.0.1:{port}/a b",
    "https://127.0.0.1:{port}\n",
    "https://127.0.0.1:{port}/\n",
    "",
    " ",
    "https://" + "a" * 64 + ".com/",
    "https://" + "a." * 127 + "com/",
    "https://example.com/" + "a" * 3000,
]

# One or more of each class, as they come from DNS; with the network that must name each.
NOT_PUBLIC = """
    0.0.0.0/8 0.0.0.0 0.1.2.3 0.255.255.255
    10.0.0.0/8 10.0.0.0 10.0.0.1 10.255.255.255
    100.64.0.0/10 100.64.0.0 100.100.100.200 100.127.255.255
    127.0.0.0/8 127.0.0.0 127.0.0.1 127.1.2.3 127.255.255.255
    168.63.129.16/32 168.63.129.16
    169.254.0.0/16 169.254.0.0 169.254.169.254 169.254.170.2 169.254.255.255
    172.16.0.0/12 172.16.0.0 172.17.0.1 172.31.255.255
    192.0.0.0/24 192.0.0.0 192.0.0.8 192.0.0.192 192.0.0.255
    192.0.2.0/24 192.0.2.0 192.0.2.255
    192.31.196.0/24 192.31.196.1
    192.52.193.0/24 192.52.193.1
    192.88.99.0/24 192.88.99.1 192.88.99.255
    192.168.0.0/16 192.168.0.0 192.168.1.1 192.168.255.255
    192.175.48.0/24 192.175.48.1
    198.18.0.0/15 198.18.0.0 198.19.255.255
    198.51.100.0/24 198.51.100.0 198.51.100.255
    203.0.113.0/24 203.0.113.0 203.0.113.255
    224.0.0.0/4 224.0.0.1 239.255.255.255
    240.0.0.0/4 240.0.0.1 255.255.255.254
    255.255.255.255/32 255.255.255.255
    ::/128 ::
    ::1/128 ::1
    ::/96 ::2 ::127.0.0.1 ::8.8.8.8
    ::ffff:0:0/96 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8
    64:ff9b::/96 64:ff9b::127.0.0.1 64:ff9b::8.8.8.8
    64:ff9b:1::/48 64:ff9b:1::1 64:ff9b:1:ffff:ffff:ffff:ffff:ffff
    100::/64 100::1
    100:0:0:1::/64 100:0:0:1::1
    2001::/32 2001:: 2001:0:4136:e378:8000:63bf:3fff:fdd2
    2001::/23 2001:1::1 2001:2::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff:ffff::1
    2001:db8::/32 2001:db8::1 2001:db8:ffff::1
    2002::/16 2002:7f00:1:: 2002:808:808::1
    2620:4f:8000::/48 2620:4f:8000::1
    3fff::/20 3fff::1 3fff:fff::1
    5f00::/16 5f00::1
    fc00::/7 fc00::1 fd00:ec2::254 fd20:ce::254 fdff::1
    fe80::/10 fe80::1 fe80::1%lo febf::1
    fec0::/10 fec0::1 feff::1
    ff00::/8 ff02::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""
BY_NETWORK = {line.split()[0]: line.split()[1:] for line in NOT_PUBLIC.strip().splitlines()}
CLASSES = [address for addresses in BY_NETWORK.values() for address in addresses]
LOCALHOST = """
    https://localhost:{port}/ https://LOCALHOST:{port}/ https://localhost.:{port}/
    https://ⓛocalhost:{port}/ https://loc\u00adalhost:{port}/ https://ＬＯＣＡＬＨＯＳＴ:{port}/
""".split()
UNASSIGNED = ["::1:0:0:1", "200::1", "1fff::1", "4000::1", "8000::1", "e000::1", "fbff::1"]
NEIGHBOURS = """
    1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
    168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0
    191.255.255.255 192.0.1.0 192.0.3.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
    198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255
    2001:200::1 2001:db7::1 2001:db9::1 2001:4860:4860::8888 2003::1 2606:4700:4700::1111
    2620:4f:7fff::1 2a00::1 3ffe::1 3fff:1000::1
""".split()


@pytest.fixture(scope="module")
def traps() -> Iterator[list[Server]]:
    """Listeners on 127.0.0.1 and ::1 that no test may reach."""
    addresses = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
    servers = [Server(lambda conn: None, address) for address in addresses]
    yield servers
    for server in servers:
        server.close()


@pytest.mark.parametrize("url", [*HOSTILE, *LOCALHOST])
def test_hostile_url_reaches_nobody(url, traps):
    for trap in traps:
        assert fails(url.replace("{port}", str(trap.port))).kind == "refused"
        assert trap.count() == 0


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_url_is_refused_without_the_network(url, dns):
    with pytest.raises(EgressError) as caught:
        egress.check_url(url.replace("{port}", "443"))
    assert caught.value.kind == "refused"
    assert fails(url.replace("{port}", "443")).kind == "refused"
    assert dns.asked == []


@pytest.mark.parametrize(
    "url",
    """
    http://api.example/ http\u017f://api.example/ https://user@api.example/
    https://user:pass@api.example/ https://@api.example/ https://api.example/#fragment
    https://api.example/a\\b https://api.example\\/ https://api.example:0/
    https://api.example:65536/ https://api.example:99999/ https://api.example:/
    https://api.example%2e/ https://[2606:4700:4700::1111%eth0]/
    https://[2606:4700:4700::1111%25eth0]/ https://2606:4700:4700::1111/ https://1.1/
    https://16843009/ https://0x1010101/ https://01.1.1.1/ https://-api.example/
    """.split(),
)
def test_syntax_is_refused_of_public_hosts_too(url):
    with pytest.raises(EgressError) as caught:
        egress.check_url(url)
    assert caught.value.kind == "refused"


def test_lists_are_long():
    assert len(HOSTILE) == len(set(HOSTILE)) > 150


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_the_same_listener_is_reached_once_it_is_allowed(address, start, allow):
    server = start(ok(b"hello"), address=address)
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{server.port}"
    assert fails(url).kind == "refused"
    assert server.count() == 0
    assert get(allow(url)).body == b"hello"
    assert server.count() == 1


def test_list_of_networks_is_the_expected_one():
    assert {str(network) for network in egress.NOT_PUBLIC} == set(BY_NETWORK)
    for network, addresses in BY_NETWORK.items():
        for address in addresses:
            assert ipaddress.ip_address(address) in ipaddress.ip_network(network)


def test_list_stands_without_the_rule_of_2000(monkeypatch):
    monkeypatch.setattr(egress, "GLOBAL_UNICAST", ipaddress.ip_network("::/0"))
    assert [one for one in CLASSES if egress.is_public(ipaddress.ip_address(one))] == []


@pytest.mark.parametrize("address", [*CLASSES, *UNASSIGNED])
def test_name_of_an_address_that_is_not_public_is_refused(address, dns, connects):
    dns.answers["evil.example"] = [[address]]
    error = fails("https://evil.example/v1")
    assert error.kind == "refused"
    assert address not in error.message  # what is in the private network is no one's business
    assert connects == []


@pytest.mark.parametrize("address", [*CLASSES, *UNASSIGNED])
def test_literal_that_is_not_public_is_refused(address):
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(EgressError) as caught:
        egress.check_url(f"https://{host}/")
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("address", NEIGHBOURS)
def test_neighbours_of_the_networks_are_public(address, dns, connects):
    host = f"[{address}]" if ":" in address else address
    assert egress.check_url(f"https://{host}:8443/v1").port == 8443
    dns.answers["api.example"] = [[address]]
    assert fails("https://api.example").kind == "unreachable"
    assert connects == [(address, 443)]


@pytest.mark.parametrize("address", ["224.0.0.1", "64:ff9b::a9fe:a9fe", "168.63.129.16"])
def test_is_global_would_not_do(address):
    """Why the networks are listed."""
    assert ipaddress.ip_address(address).is_global
    assert not egress.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "answer",
    [
        order
        for bad in ("10.0.0.1", "127.0.0.1", "::1", "169.254.169.254", "::ffff:127.0.0.1")
        for order in itertools.permutations([PUBLIC, OTHER_PUBLIC, bad])
    ],
)
def test_one_bad_address_spoils_the_answer(answer, dns, connects):
    dns.answers["mixed.example"] = [list(answer)]
    assert fails("https://mixed.example/").kind == "refused"
    assert connects == []


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://api.openai.com/v1", "api.openai.com", 443, "/v1"),
        ("HTTPS://API.OpenAI.com.", "api.openai.com", 443, "/"),
        ("https://api.example:8443?a=b/c@d:e", "api.example", 8443, "/?a=b/c@d:e"),
        ("https://bücher.example/%C3%BC", "xn--bcher-kva.example", 443, "/%C3%BC"),
        ("https://my_llm.example:1//x", "my_llm.example", 1, "//x"),
        ("https://１.１.１.１", "1.1.1.1", 443, "/"),
        ("https://[2606:4700:4700:0::1111]:65535/", OTHER_PUBLIC, 65535, "/"),
        ("https://3com.example", "3com.example", 443, "/"),
        ("https://example.0x7g", "example.0x7g", 443, "/"),
    ],
)
def test_what_is_fine(url, host, port, path):
    target = egress.check_url(url)
    assert (target.scheme, target.host, target.port, target.path) == ("https", host, port, path)
    assert not target.allowed


# --- Resolved once ---------------------------------------------------------------------------


class Authority:
    """A certificate authority of the test's own, as a file, and servers that it vouches for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test CA")])
        self.file = folder / "ca.pem"
        ca = self.sign(self.name, self.key, x509.BasicConstraints(ca=True, path_length=None))
        self.file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        self.asked_for: list[str | None] = []

    def sign(self, subject: x509.Name, key: Any, *extensions: Any, days: int = 1) -> Any:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            issuer_name=self.name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(days=9),
            not_valid_after=now + timedelta(days=days),
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def context(self, name: str, days: int = 1) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            general: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            general = x509.DNSName(name)
        names = x509.SubjectAlternativeName([general])
        certificate = self.sign(x509.Name([]), key, names, days=days)
        pem = self.folder / f"{name}.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        context.sni_callback = lambda _, name, __: self.asked_for.append(name)
        return context


@pytest.fixture
def authority(tmp_path: Path, settings: Any) -> Authority:
    made = Authority(tmp_path)
    settings.EGRESS_CA_FILE = str(made.file)
    return made


def test_rebinding_changes_nothing(start, authority, dns, connects, monkeypatch):
    server = start(ok(b"models"), tls=authority.context("api.example"))
    connects.route(server)
    dns.answers["api.example"] = [[PUBLIC], ["127.0.0.1"]]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved again"))
        assert get("https://API.example/v1/models").body == b"models"
    assert dns.asked == [("api.example", 443)]
    assert connects == [(PUBLIC, 443)]
    assert authority.asked_for == ["api.example"]
    assert b"\r\nhost: api.example\r\n" in server.requests[0]
    assert fails("https://api.example/v1/models").kind == "refused"
    assert connects == [(PUBLIC, 443)]


def test_getaddrinfo_is_called_once(connects, monkeypatch):
    """The same with our own `resolve`: whatever asks a second time gets a private address."""
    asked = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> Any:
        asked.append(host)
        address = PUBLIC if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fails("https://api.example:8443/v1").kind == "unreachable"
    assert asked == ["api.example"]
    assert connects == [(PUBLIC, 8443)]


def test_our_own_resolve_knows_localhost():
    assert "127.0.0.1" in egress.resolve("localhost", 443)


def test_next_address_is_tried_when_one_does_not_answer(start, authority, dns, connects):
    connects.route(start(ok(b""), tls=authority.context("api.example")), dead=(OTHER_PUBLIC,))
    dns.answers["api.example"] = [[OTHER_PUBLIC, PUBLIC]]
    assert get("https://api.example").status == 200
    assert connects == [(OTHER_PUBLIC, 443), (PUBLIC, 443)]
    # The first may not take all the time.
    assert connects.timeouts[0] <= GENEROUS / 2 < connects.timeouts[1]


def test_none_answers(dns, connects):
    dns.answers |= {"api.example": [[PUBLIC, OTHER_PUBLIC]], "empty.example": [[]]}
    assert fails("https://api.example").kind == "unreachable"
    assert connects == [(PUBLIC, 443), (OTHER_PUBLIC, 443)]
    assert fails("https://empty.example").kind == "unreachable"
    assert fails("https://nowhere.example").kind == "unreachable"
    assert len(connects) == 2


# --- Exceptions for self-hosted installations ------------------------------------------------


def test_only_the_very_origin_is_allowed(start, allow, dns):
    server, other = start(ok(b"yes")), start(ok(b"no"))
    dns.answers = {name: [["127.0.0.1"]] for name in ("127.0.0.1", "llm.internal", "localhost")}
    allow(f"http://127.0.0.1:{server.port}")
    for url in (
        f"http://127.0.0.1:{other.port}",
        f"https://127.0.0.1:{server.port}",
        f"http://localhost:{server.port}",
        f"http://llm.internal:{server.port}",
        f"https://llm.internal:{server.port}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{server.port}@llm.internal",
        f"http://user@127.0.0.1:{server.port}",
        f"http://127.0.0.1:{server.port}/#fragment",
    ):
        assert fails(url).kind == "refused"
    assert server.count() == other.count() == 0
    assert get(f"HTTP://127.0.0.1.:{server.port}/v1?x").body == b"yes"
    allow(f"http://LLM.internal.:{server.port}/")
    assert get(f"http://llm.internal:{server.port}").body == b"yes"
    assert server.count() == 2 and other.count() == 0


def test_default_ports_are_the_same_origin(settings):
    settings.EGRESS_ALLOWED_ORIGINS = ["https://a.internal", "http://b.internal:80"]
    assert egress.check_url("https://a.internal:443/").allowed
    assert egress.check_url("http://b.internal/").allowed
    assert not egress.check_url("https://b.internal/").allowed


@pytest.mark.parametrize(
    "origin", ["llm.internal", "*", "http://127.1", "https://x.internal/v1", "https://u@x.internal"]
)
def test_allowed_origin_must_be_one(origin, allow):
    allow(origin)
    with pytest.raises(ImproperlyConfigured, match="EGRESS_ALLOWED_ORIGINS"):
        egress.check_url("https://api.example/")


def test_environment_proxies_play_no_part(start, allow, monkeypatch):
    server, proxy = start(ok(b"direct")), start(ok(b"by proxy"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    assert get(allow(f"http://127.0.0.1:{server.port}")).body == b"direct"
    assert proxy.count() == 0


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture
def llm(start: Any, allow: Any, dns: Resolver, authority: Authority) -> Callable[..., str]:
    """URL of a server on 127.0.0.1, allowed as "llm.test", with a certificate for ``name``."""

    def make(*parts: bytes, name: str = "llm.test", days: int = 1, **options: Any) -> str:
        server = start(*parts, tls=authority.context(name, days), **options)
        dns.answers["llm.test"] = [["127.0.0.1"]]
        url: str = allow(f"https://llm.test:{server.port}")
        return url

    return make


def test_certificate_of_our_authority_passes(llm, authority):
    assert get(llm(ok(b"over TLS"))).body == b"over TLS"
    assert authority.asked_for == ["llm.test"]


def test_certificate_of_another_name_does_not(llm):
    error = fails(llm(ok(b"over TLS"), name="other.test"))
    assert error.kind == "unreachable"
    assert "certificate" in error.message


def test_certificate_that_expired_does_not(llm):
    assert fails(llm(ok(b"over TLS"), days=-1)).kind == "unreachable"


def test_certificate_of_an_unknown_authority_does_not(llm, settings):
    url = llm(ok(b"over TLS"))
    settings.EGRESS_CA_FILE = ""
    assert fails(url).kind == "unreachable"


def test_certificate_for_an_address(start, allow, authority):
    server = start(ok(b"over TLS"), tls=authority.context("127.0.0.1"))
    assert get(allow(f"https://127.0.0.1:{server.port}")).body == b"over TLS"
    server = start(ok(b"over TLS"), tls=authority.context("127.0.0.2"))
    assert fails(allow(f"https://127.0.0.1:{server.port}")).kind == "unreachable"


def test_server_without_tls_is_unreachable(start, allow):
    server = start(handler=lambda server, conn: conn.sendall(ok(b"plain")))
    assert fails(allow(f"https://127.0.0.1:{server.port}")).kind == "unreachable"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authority_file_must_be_one(content, tmp_path, settings, start, allow):
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    settings.EGRESS_CA_FILE = str(file)
    with pytest.raises(ImproperlyConfigured, match="EGRESS_CA_FILE"):
        get(allow(f"https://127.0.0.1:{start().port}"))


# --- What comes back -------------------------------------------------------------------------


@pytest.fixture
def url(start: Any, allow: Any) -> Callable[..., str]:
    """URL of a server that answers with ``parts``; allowed, so that its answer is what counts."""

    def make(*parts: bytes, **options: Any) -> str:
        return str(allow(f"http://127.0.0.1:{start(*parts, **options).port}")) + "/v1/models"

    return make


def test_answer(url):
    answer = get(url(ok(b'{"data": []}', b"X-Two: 1", b"Server: t\xe9st", b"x-two: 2")))
    assert (answer.status, answer.body) == (200, b'{"data": []}')
    assert answer.headers == {"content-length": "12", "x-two": "1, 2", "server": "tést"}


@pytest.mark.parametrize("status", [200, 201, 204, 400, 401, 403, 404, 429, 500, 503])
def test_any_other_status_is_an_answer(status, url):
    assert get(url(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)).status == status


def test_chunks_and_bodies_that_end_with_the_connection(url):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert get(url(chunked, b"3\r\nabc\r\n", b"1\r\nd\r\n0\r\n\r\n", every=0.05)).body == b"abcd"
    assert get(url(b"HTTP/1.0 200 OK\r\n\r\n", b"abc", b"d", every=0.05)).body == b"abcd"
    assert get(url(b"HTTP/1.1 103 Early Hints\r\n\r\n", ok(b"abcd"), every=0.05)).body == b"abcd"


def test_request(start, allow):
    server = start(ok(b""))
    origin = allow(f"http://127.0.0.1:{server.port}")
    theirs = {"HOST": "evil.example", "accept-encoding": "gzip", "User-Agent": "mine"}
    get(f"{origin}/v1/models?limit=1", headers=HEADERS | theirs)
    line, *lines = server.requests[0].removesuffix(b"\r\n\r\n").decode().split("\r\n")
    assert line == "GET /v1/models?limit=1 HTTP/1.1"
    assert sorted(lines) == [
        "accept-encoding: identity",
        f"authorization: Bearer {CANARY}",
        "connection: close",
        f"host: 127.0.0.1:{server.port}",
        "user-agent: mine",
    ]


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("to", ["http://127.0.0.1:{port}/", "https://127.0.0.1:{port}/", "/x"])
def test_redirects_are_not_followed(status, to, start, allow):
    inside = start(ok(b"secret of the inside"))
    allow(f"http://127.0.0.1:{inside.port}")  # not even to where a call may go
    location = to.format(port=inside.port).encode()
    head = b"HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, location)
    server = start(head)
    error = fails(allow(f"http://127.0.0.1:{server.port}"))
    assert error.kind == "redirect"
    assert server.count() == 1 and inside.count() == 0


def endless(head: bytes, part: bytes, every: float = 0) -> Any:
    def handler(server: Server, conn: socket.socket) -> None:
        if not head.startswith(b"\x16"):
            server.read_request(conn)
        conn.sendall(head)
        give_up = time.monotonic() + 4 * GENEROUS
        while not server.over.wait(every) and time.monotonic() < give_up:
            conn.sendall(part)

    return handler


def hang(server: Server, conn: socket.socket) -> None:
    server.over.wait(30)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "hangs before answering": hang,
    "slow status line": endless(b"HTTP/1.1 200 ", b"O", 0.1),
    "slow headers": endless(b"HTTP/1.1 200 OK\r\n", b"a", 0.1),
    "slow header lines": endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n", 0.1),
    "slow body": endless(ok(b"")[:-5] + b"1000\r\n\r\n", b"x", 0.1),
    "slow body that ends with the connection": endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.1),
    "slow chunks": endless(CHUNKED, b"1\r\nx\r\n", 0.1),
    "slow trailers": endless(CHUNKED + b"0\r\n", b"a: b\r\n", 0.1),
    "for ever in a moment": endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.1),
    "busy with one-byte chunks": endless(CHUNKED, b"1\r\nx\r\n" * 100),
}


def assert_times_out(url: str) -> None:
    started = time.monotonic()
    assert fails(url, within=SOON).kind == "timeout"
    assert time.monotonic() - started < GENEROUS


@pytest.mark.parametrize("how", SLOW)
def test_deadline_holds(how, url):
    assert_times_out(url(handler=SLOW[how]))


@pytest.mark.parametrize("how", SLOW)
def test_deadline_holds_over_tls(how, llm):
    assert_times_out(llm(handler=SLOW[how]))


def drip_handshake(server: Server, conn: socket.socket) -> None:
    endless(b"\x16\x03\x03\x20\x00", b"\x02", 0.1)(server, conn)  # a record of 8 KiB is to come


@pytest.mark.parametrize("handler", [hang, drip_handshake])
def test_deadline_holds_in_the_handshake(handler, start, allow):
    assert_times_out(allow(f"https://127.0.0.1:{start(handler=handler).port}"))


def test_deadline_holds_while_resolving(monkeypatch, connects):
    over = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        over.wait(30)
        return [PUBLIC]

    monkeypatch.setattr(egress, "resolve", resolve)
    assert_times_out("https://slow.example/")
    over.set()
    assert connects == []


def test_deadline_holds_while_connecting(monkeypatch, dns):
    def connect(sock: socket.socket, address: Any) -> None:
        time.sleep(min(sock.gettimeout() or 30, 30))
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", connect)
    dns.answers["far.example"] = [[f"8.8.8.{last}" for last in range(20)]]
    assert_times_out("https://far.example/")


def test_deadline_that_is_over(dns, connects):
    dns.answers["api.example"] = [[PUBLIC]]
    assert fails("https://api.example", within=-1).kind == "timeout"
    assert connects == []


def flood(server: Server, conn: socket.socket) -> None:
    server.read_request(conn)
    conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (50 * 2**20))
    for _ in range(50):
        conn.sendall(bytes(2**20))


TOO_LARGE = {
    "50 MB": flood,
    "endless": endless(b"HTTP/1.1 200 OK\r\n\r\n", bytes(2**16)),
    "endless chunks": endless(CHUNKED, b"10000\r\n" + bytes(2**16) + b"\r\n"),
    "endless error": endless(b"HTTP/1.1 500 Sorry\r\n\r\n", bytes(2**16)),
    "endless headers": endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
    "endless header": endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 10000),
    "endless status line": endless(b"HTTP/1.1 200 ", b"OK" * 10000),
    "endless chunk head": endless(CHUNKED, b"0" * 10000),
    "endless trailers": endless(CHUNKED + b"0\r\n", b"a: b\r\n" * 1000),
}


@pytest.mark.parametrize("how", TOO_LARGE)
def test_size_is_capped(how, url):
    assert fails(url(handler=TOO_LARGE[how]), within=30).kind == "too_large"


def test_size_is_capped_to_the_byte(url):
    assert egress.MAX_BYTES == 8 * 1024 * 1024
    assert len(get(url(ok(bytes(egress.MAX_BYTES)))).body) == egress.MAX_BYTES
    assert fails(url(ok(bytes(egress.MAX_BYTES + 1)))).kind == "too_large"
    assert get(url(ok(b"12345")), max_bytes=5).body == b"12345"
    assert fails(url(ok(b"123456")), max_bytes=5).kind == "too_large"


@pytest.mark.parametrize(
    "coding", [b"gzip", b"GZIP", b"deflate", b"br", b"zstd", b"gzip, identity"]
)
def test_compressed_body_is_not_taken(coding, url):
    bomb = gzip.compress(bytes(64 * 2**20))
    assert len(bomb) < 100_000
    assert fails(url(ok(bomb, b"Content-Encoding: " + coding))).kind == "malformed"


def test_body_called_identity_is_taken(url):
    assert get(url(ok(b"plain", b"Content-Encoding: Identity"))).body == b"plain"


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"220 mail.example ESMTP\r\n",
        b"\x00\xff" * 50,
        b"\r\n",
        b"HTTQ",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na\x00: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"1\r\nabc\r\n",
    ],
)
def test_garbage_is_malformed(garbage, url):
    """At once, with the connection still open: not when the time is over."""
    assert fails(url(garbage, every=20)).kind == "malformed"


@pytest.mark.parametrize(
    "part",
    [b"", b"HT", b"HTTP/1.1 200 OK\r\nA: b", ok(b"12345")[:-1], CHUNKED + b"5\r\n123", CHUNKED],
)
def test_broken_off_answer_is_unreachable(part, url):
    def half_close(server: Server, conn: socket.socket) -> None:
        server.read_request(conn)
        conn.sendall(part)
        conn.shutdown(socket.SHUT_WR)
        server.over.wait(20)

    def reset(server: Server, conn: socket.socket) -> None:
        server.read_request(conn)
        conn.sendall(part)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    assert fails(url(part)).kind == "unreachable"
    assert fails(url(handler=half_close)).kind == "unreachable"
    assert fails(url(handler=reset)).kind == "unreachable"


def test_closed_port_is_unreachable(allow):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert fails(allow(f"http://127.0.0.1:{port}")).kind == "unreachable"


# --- The key stays here ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"{CANARY}\r\nX-Smuggled: 1"},
        {"Authorization": f"{CANARY}\n"},
        {"Authorization": f" {CANARY}"},
        {"Authorization": f"{CANARY}é"},
        {"Authorization": f"{CANARY}\x00"},
        {"Authorization": f"{CANARY}🔑"},
        {f"X {CANARY}": "1"},
        {"Content-Length": CANARY},
    ],
)
def test_header_that_cannot_be_sent_is_refused_unseen(headers, start, allow):
    server = start(ok(b""))
    error = fails(allow(f"http://127.0.0.1:{server.port}"), headers=headers)
    assert error.kind == "refused"
    assert server.count() == 0


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        (b"", "malformed"),
        (b"HTTP/1.1 ", "malformed"),
        (b"HTTP/1.1 200 OK\r\n\x00", "malformed"),
        (b"HTTP/1.1 302 Found\r\nLocation: ", "redirect"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: ", "malformed"),
        (CHUNKED, "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", "unreachable"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "too_large"),
    ],
)
def test_error_does_not_quote_a_server_that_echoes_the_key(prefix, kind, url):
    def echo(server: Server, conn: socket.socket) -> None:
        request = server.read_request(conn)
        conn.sendall(prefix + request.replace(b"\r\n", b" ") + b"\r\n\r\n")

    assert fails(url(handler=echo), max_bytes=999 if kind == "unreachable" else 9).kind == kind


def test_answer_and_target_do_not_show_what_they_hold(url):
    answer = get(url(ok(CANARY.encode(), f"X-Echo: {CANARY}".encode())))
    assert CANARY in answer.body.decode() and CANARY in answer.headers["x-echo"]
    assert CANARY not in f"{answer!r} {answer}"
    target = egress.check_url(f"https://api.example/v1?key={CANARY}")
    assert CANARY not in f"{target!r} {target}"
    for bad in (f"https://10.0.0.1/{CANARY}", f"https://u:{CANARY}@x.example", f"//{CANARY}"):
        fails(bad)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(EgressError("timeout", "It took too long.")))
    assert (error.kind, error.message, str(error)) == (
        "timeout",
        "It took too long.",
        "It took too long.",
    )
