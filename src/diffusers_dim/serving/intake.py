# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a server takes from strangers: pictures, prompts, names and, if switched on, addresses of pictures."""

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image

from ..files import READ_ERRORS
from ..image_processor import DIMImageProcessor


MAX_BYTES = 16 * 1024**2
MAX_PIXELS = 16 * 1024**2
MAX_PROMPT_CHARACTERS = 8000
# The formats that are read, and how their files begin.
SIGNATURES = {"PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF.{4}WEBP"}
# A progressive JPEG has about ten scans, each of which goes over the whole picture: a small file of thousands of them
# takes minutes to decode.
MAX_JPEG_SCANS = 100
# What PIL was seen to raise for broken uploads besides.
_READ_ERRORS = (*READ_ERRORS, EOFError, OverflowError, Image.DecompressionBombWarning)

FETCH_SECONDS = 10.0
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses that stand for IPv4 ones behind a translator.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_PROCESSOR = DIMImageProcessor()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class UploadError(ValueError):
    """
    What was sent cannot be taken; the message says why, for a person.

    Args:
        message (`str`): The words.
        status (`int`, defaults to 422): The HTTP status that fits: 400, 413, 415 or 422.
    """

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


def read_upload(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    A picture of an uploaded file, as a person sees it: EXIF rotation applied, transparency over white, of an animation
    the first frame. Its size is known from the file's first bytes, so that nothing too large is ever decoded.

    Args:
        data (`bytes`): The file: PNG, JPEG or WebP, told by its content.
        max_bytes (`int`, defaults to 16 MiB): The longest file.
        max_pixels (`int`, defaults to 16 * 1024 * 1024): The largest picture, width times height.

    Returns:
        `PIL.Image.Image`: In RGB, see [`DIMImageProcessor.to_rgb`].

    Raises:
        UploadError: If it is none of that.
    """
    if not data:
        raise UploadError("The picture's file is empty.", 400)
    if len(data) > max_bytes:
        raise UploadError(f"The picture's file has {len(data):,} bytes; at most {max_bytes:,} are allowed.", 413)
    formats = [name for name, start in SIGNATURES.items() if re.match(start, data, re.DOTALL)]
    if not formats:
        raise UploadError("The file is no picture that can be read: send a PNG, JPEG or WebP.", 415)
    if formats == ["WEBP"]:
        # PIL reserves memory for all of its pixels when it opens one.
        _check_size(*_read_webp_size(data), max_pixels)
    if formats == ["JPEG"] and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise UploadError(f"The JPEG has more than {MAX_JPEG_SCANS} scans; save it anew.")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(*image.size, max_pixels)
            return _PROCESSOR.to_rgb(image)[0]
    except UploadError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UploadError(f"The picture is too large: at most {max_pixels:,} pixels are allowed.", 413) from error
    except _READ_ERRORS as error:
        # PIL's own words may hold a memory address.
        words = str(error) if "beyond the aspect ratio" in str(error) else "it is broken or cut short"
        raise UploadError(f"The {formats[0]} picture cannot be read: {words}.") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UploadError(
            f"The picture has {width}x{height} pixels, {width * height:,}; at most {max_pixels:,} are allowed.", 413
        )


def _read_webp_size(data: bytes) -> tuple[int, int]:
    """Width and height by a WebP file's first chunk (https://developers.google.com/speed/webp/docs/riff_container)."""
    kind = data[12:16]
    if len(data) >= 30:
        if kind == b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if kind == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 ":
            sides = data[26:28], data[28:30]
            return tuple(int.from_bytes(side, "little") & 0x3FFF for side in sides)  # type: ignore[return-value]
    raise UploadError("The WEBP picture cannot be read: it is broken or cut short.")


def read_prompt(text: str, max_characters: int = MAX_PROMPT_CHARACTERS, name: str = "prompt") -> str:
    """
    A prompt without blanks around it.

    Args:
        text (`str`): What was sent.
        max_characters (`int`, defaults to 8000): The longest.
        name (`str`, defaults to "prompt"): What errors call it.

    Raises:
        UploadError: If it holds no text, is too long, or holds a control character other than line breaks and tabs.
    """
    if not isinstance(text, str):
        raise UploadError(f"`{name}` has to be a text, but is {type(text).__name__}.", 400)
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise UploadError(f"`{name}` holds no text.", 400)
    if len(text) > max_characters:
        raise UploadError(f"`{name}` has {len(text):,} characters; at most {max_characters:,} are allowed.", 400)
    for character in text:
        # Cs: half a surrogate pair, which cannot be written as UTF-8.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise UploadError(f"`{name}` holds the control character U+{ord(character):04X}.", 400)
    return text


def sanitize_name(name: str, max_characters: int = 80) -> str:
    """A file's name for people to see: no folders, no invisible characters, not long. It is no path to open."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(character for character in name if unicodedata.category(character)[0] != "C").strip()
    return name if len(name) <= max_characters else f"{name[: max_characters - 1]}…"


def fetch_image(
    url: str,
    *,
    enabled: bool = False,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    timeout: float = FETCH_SECONDS,
    trusted_networks: Sequence[Network] = (),
) -> Image.Image:
    """
    The picture at an address, see [`read_upload`]. The host's name is looked up once and the connection goes to the
    very address that was checked; so it is at each redirect. Proxies of the environment are not used.

    Args:
        url (`str`): Of http or https, at a public host.
        enabled (`bool`, defaults to `False`): Whether the server's owner has switched this on.
        max_bytes (`int`, defaults to 16 MiB): The longest file.
        max_pixels (`int`, defaults to 16 * 1024 * 1024): The largest picture.
        timeout (`float`, defaults to 10.0): Seconds for all of it.
        trusted_networks (`Sequence[ip_network]`): Where hosts may be that are not public.

    Raises:
        UploadError: If it is switched off, the address is none of that, or what is there is no such picture.
    """
    if not enabled:
        raise UploadError("This server fetches no pictures from addresses: upload the file.", 400)
    deadline = time.monotonic() + timeout
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _read_url(url)
            with _connect(parts, deadline, trusted_networks) as connection, _closed_at(connection, deadline):
                target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
                    f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
                )
                headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
                if response.status in _REDIRECTS and (location := response.getheader("Location")):
                    url = urljoin(url, location)
                    continue
                if response.status != 200:
                    raise UploadError(f"The picture's address answered with HTTP {response.status}.")
                data = response.read(max_bytes + 1)
                if time.monotonic() >= deadline:
                    raise TimeoutError
                return read_upload(data, max_bytes=max_bytes, max_pixels=max_pixels)
        raise UploadError(f"The picture's address redirects more than {MAX_REDIRECTS} times.")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise UploadError(f"The picture's address took longer than {timeout:g} s.") from error
        raise UploadError("The picture's address cannot be reached.") from error


def _read_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UploadError("The picture's address is no URL.", 400) from error
    if parts.scheme not in ("http", "https"):
        raise UploadError("The picture's address has to begin with https:// or http://.", 400)
    if not parts.hostname or parts.username is not None or port == 0 or not parts.netloc.isascii():
        raise UploadError("The picture's address has to be https://HOST/PATH, with no user or password.", 400)
    return parts


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet: not private, local, reserved or multicast, nor one in disguise."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _NAT64
    ):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _resolve(parts: SplitResult, deadline: float, trusted_networks: Sequence[Network]) -> list[tuple[int, tuple]]:
    """Families and socket addresses of a host, all of which have to be allowed."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    resolver = ThreadPoolExecutor(max_workers=1)  # getaddrinfo has no time limit of its own
    try:
        lookup = resolver.submit(socket.getaddrinfo, parts.hostname, port, type=socket.SOCK_STREAM)
        found = lookup.result(max(0.0, deadline - time.monotonic()))
    except (socket.gaierror, UnicodeError) as error:
        raise UploadError("The picture's address has a host that is not known.") from error
    finally:
        resolver.shutdown(wait=False)
    for entry in found:
        address = ipaddress.ip_address(entry[4][0])
        if not is_public(address) and not any(address in network for network in trusted_networks):
            raise UploadError("The picture's address is not at a public host.", 400)
    return [(entry[0], entry[4]) for entry in found]


@contextlib.contextmanager
def _connect(
    parts: SplitResult, deadline: float, trusted_networks: Sequence[Network]
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address that was checked."""
    family, address = _resolve(parts, deadline, trusted_networks)[0]
    plain = socket.socket(family, socket.SOCK_STREAM)
    connection = http.client.HTTPConnection(parts.hostname)
    try:
        plain.settimeout(max(0.01, deadline - time.monotonic()))
        plain.connect(address)
        connection.sock = plain
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
        yield connection
    finally:
        connection.close()
        plain.close()


@contextlib.contextmanager
def _closed_at(connection: http.client.HTTPConnection, deadline: float) -> Iterator[None]:
    """Ends a connection at a time: a socket's own limit counts from its last byte."""
    sock = connection.sock

    def end() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
