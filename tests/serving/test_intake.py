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
"""What is taken from strangers."""

import io
import ipaddress
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from server_runs import png

from diffusers_dim.serving.intake import UploadError, fetch_image, is_public, read_prompt, read_upload, sanitize_name


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
LOCAL = [ipaddress.ip_network("127.0.0.0/8")]


def encode(image_format, image=NOISE, **options):
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    """A PNG that says it is of that size, in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def webp_bomb(width, height):
    """The same as a WebP."""
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + bytes(8)
    return b"RIFF" + struct.pack("<I", len(body)) + body


class TestReadUpload:
    @pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
    def test_gives_the_very_pixels(self, image_format):
        image = read_upload(encode(image_format, lossless=True) if image_format == "WEBP" else encode("PNG"))
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(NOISE))

    def test_turns_a_jpeg_as_exif_says(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        assert read_upload(encode("JPEG", exif=exif)).size == (48, 64)

    def test_lays_transparency_over_white(self):
        clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
        assert read_upload(png(clear)).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
    def test_takes_the_first_frame_of_an_animation(self, image_format):
        red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
        data = encode(image_format, red, save_all=True, append_images=[blue], duration=100)
        assert read_upload(data).getpixel((8, 8))[0] > 200

    @pytest.mark.parametrize("image_format", ["BMP", "GIF", "TIFF", "PPM", "ICO"])
    def test_other_formats_are_of_status_415(self, image_format):
        with pytest.raises(UploadError, match="PNG, JPEG or WebP") as caught:
            read_upload(encode(image_format))
        assert caught.value.status == 415

    @pytest.mark.parametrize(
        "data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe", b"text", b"\x80\x04."]
    )
    def test_what_is_no_picture_is_of_status_415(self, data):
        with pytest.raises(UploadError) as caught:
            read_upload(data)
        assert caught.value.status == 415

    @pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("bomb", [png_bomb, webp_bomb])
    @pytest.mark.parametrize("size", [(5000, 5000), (12_000, 12_000)])
    def test_a_bomb_is_known_by_its_header(self, bomb, size):
        with pytest.raises(UploadError, match="at most 16,777,216") as caught:
            read_upload(bomb(*size))
        assert caught.value.status == 413

    def test_a_bomb_beyond_what_pil_opens_is_refused_too(self):
        with pytest.raises(UploadError, match="at most 16,777,216") as caught:
            read_upload(png_bomb(60_000, 60_000))
        assert caught.value.status == 413

    def test_long_files_are_refused_unread(self):
        with pytest.raises(UploadError, match="100 are allowed") as caught:
            read_upload(png(NOISE), max_bytes=100)
        assert caught.value.status == 413

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
    def test_files_that_are_cut_short_are_of_status_422(self, image_format, share):
        data = encode(image_format)
        with pytest.raises(UploadError, match="broken or cut short") as caught:
            read_upload(data[: max(30, int(len(data) * share))])
        assert caught.value.status == 422

    def test_a_wrong_checksum_is_of_status_422(self):
        data = bytearray(png(NOISE))
        data[len(data) // 2] ^= 255
        with pytest.raises(UploadError, match="broken") as caught:
            read_upload(bytes(data))
        assert caught.value.status == 422

    def test_a_jpeg_of_very_many_scans_is_refused(self):
        data = encode("JPEG", progressive=True)
        start = data.index(b"\xff\xda")
        with pytest.raises(UploadError, match="scans"):
            read_upload(data[:-2] + data[start : start + 20] * 200 + data[-2:])

    def test_very_long_pictures_are_refused_in_words(self):
        with pytest.raises(UploadError, match="201x1 pixels is beyond the aspect ratio"):
            read_upload(png(Image.new("RGB", (201, 1))))

    def test_an_empty_file_is_of_status_400(self):
        with pytest.raises(UploadError, match="empty") as caught:
            read_upload(b"")
        assert caught.value.status == 400

    def test_nothing_but_an_upload_error_comes_of_broken_bytes(self):
        generator = np.random.default_rng(1)
        files = [encode("PNG"), encode("JPEG"), encode("WEBP")]
        outcomes = set()
        for number in range(600):
            data = bytearray(files[number % 3])
            for place in generator.integers(0, len(data) if number % 2 else 200, 4):
                data[place] = generator.integers(0, 256)
            try:
                outcomes.add(read_upload(bytes(data)).mode)
            except UploadError as error:
                outcomes.add(error.status)
        assert {"RGB", 415, 422} <= outcomes <= {"RGB", 413, 415, 422}


class TestReadPrompt:
    def test_keeps_lines_and_drops_blanks_around(self):
        assert read_prompt("  1. One\r\n2. Two\t3 \n") == "1. One\n2. Two\t3"

    @pytest.mark.parametrize("text", ["", " \n ", "a\0b", "a\x1b[31m", "a\x85b", "\ud800", 3, None])
    def test_refuses_what_is_no_prompt(self, text):
        with pytest.raises(UploadError) as caught:
            read_prompt(text)
        assert caught.value.status == 400

    def test_says_how_long_it_may_be(self):
        assert read_prompt("x" * 10, max_characters=10)
        with pytest.raises(UploadError, match="`blueprint` has 11 characters; at most 10"):
            read_prompt("x" * 11, max_characters=10, name="blueprint")


class TestSanitizeName:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("../../etc/passwd", "passwd"),
            (r"C:\pictures\cat.png", "cat.png"),
            ("a\nb\x00\u202egnp.png", "abgnp.png"),
            ("x" * 100, "x" * 79 + "…"),
        ],
    )
    def test_leaves_a_short_visible_name(self, name, shown):
        assert sanitize_name(name) == shown


@contextmanager
def serve_files(answer):
    """A web server whose handler is `answer(handler)`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def send(data, status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


class TestFetchImage:
    def test_is_switched_off(self):
        with pytest.raises(UploadError, match="fetches no pictures"):
            fetch_image("https://example.com/cat.png")

    def test_reads_a_picture_at_a_trusted_network(self):
        with serve_files(send(png(NOISE))) as url:
            image = fetch_image(f"{url}/a b/ü.png?x=1", enabled=True, trusted_networks=LOCAL)
        assert np.array_equal(np.asarray(image), np.asarray(NOISE))

    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1",
            "localhost",
            "2130706433",
            "0x7f.1",
            "0.0.0.0",
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "[::1]",
            "[::]",
            "[fe80::1]",
            "[fc00::1]",
            "[ff02::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:8.8.8.8]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
        ],
    )
    def test_refuses_hosts_that_are_not_public(self, host):
        with pytest.raises(UploadError, match="not at a public host") as caught:
            fetch_image(f"http://{host}/cat.png", enabled=True)
        assert caught.value.status == 400

    @pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111"])
    def test_public_addresses_are_told_from_others(self, address):
        assert is_public(ipaddress.ip_address(address))

    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd",
            "ftp://example.com/a.png",
            "data:image/png;base64,AAAA",
            "/etc/passwd",
            "http://",
            "http://user:secret@example.com/a.png",
            "http://example.com:99999/a.png",
            "http://[::1/a.png",
        ],
    )
    def test_takes_http_and_https_alone(self, url):
        with pytest.raises(UploadError) as caught:
            fetch_image(url, enabled=True)
        assert caught.value.status == 400
        assert "secret" not in str(caught.value)

    def test_checks_redirects_again(self):
        with serve_files(send(png(NOISE))) as inner:
            to_inner = inner.replace("127.0.0.1", "127.0.0.2")
            with serve_files(send(b"", 302, Location=to_inner)) as url:
                with pytest.raises(UploadError, match="not at a public host"):
                    fetch_image(url, enabled=True, trusted_networks=[ipaddress.ip_network("127.0.0.1/32")])

    def test_follows_three_redirects_and_no_more(self):
        def answer(handler):
            left = int(handler.path[1:])
            send(png(NOISE))(handler) if not left else send(b"", 302, Location=f"/{left - 1}")(handler)

        with serve_files(answer) as url:
            assert fetch_image(f"{url}/3", enabled=True, trusted_networks=LOCAL).size == NOISE.size
            with pytest.raises(UploadError, match="more than 3 times"):
                fetch_image(f"{url}/4", enabled=True, trusted_networks=LOCAL)

    def test_connects_to_the_address_that_was_checked(self, monkeypatch):
        """A name whose second look-up would say something else."""
        answers = iter(["127.0.0.1"])
        with serve_files(send(png(NOISE))) as url:
            port = int(url.rsplit(":", 1)[1])

            def look_up(host, port, **options):
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

            monkeypatch.setattr(socket, "getaddrinfo", look_up)
            image = fetch_image(f"http://pictures.example:{port}/", enabled=True, trusted_networks=LOCAL)
        assert image.size == NOISE.size

    def test_reads_no_more_than_allowed(self):
        with serve_files(send(png(NOISE) + bytes(10_000))) as url:
            with pytest.raises(UploadError, match="at most 9,000") as caught:
                fetch_image(url, enabled=True, trusted_networks=LOCAL, max_bytes=9000)
        assert caught.value.status == 413

    def test_ends_a_dripping_answer(self):
        def drip(handler):
            send(png(NOISE)[:10])(handler)
            for _ in range(100):
                time.sleep(0.05)
                try:
                    handler.wfile.write(b"\0")
                    handler.wfile.flush()
                except OSError:
                    return

        with serve_files(drip) as url:
            with pytest.raises(UploadError, match="longer than 0.3 s"):
                fetch_image(url, enabled=True, trusted_networks=LOCAL, timeout=0.3)

    def test_says_what_the_address_answered(self):
        with serve_files(send(b"", 404)) as url:
            with pytest.raises(UploadError, match="HTTP 404"):
                fetch_image(url, enabled=True, trusted_networks=LOCAL)

    def test_says_that_nobody_answers(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            with pytest.raises(UploadError, match="cannot be reached"):
                fetch_image(f"http://127.0.0.1:{free.getsockname()[1]}/", enabled=True, trusted_networks=LOCAL)

    def test_checks_a_servers_certificate(self):
        with serve_files(send(png(NOISE))) as url:
            with pytest.raises(UploadError, match="cannot be reached"):
                fetch_image(url.replace("http:", "https:"), enabled=True, trusted_networks=LOCAL)
