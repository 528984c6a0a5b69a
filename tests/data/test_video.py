"""Films and animations: every frame in order, damage in words, and back into a file."""

from __future__ import annotations

import struct
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from dino_kd.data import video
from dino_kd.data.video import is_video, open_video, read_frames, video_path, write_video
from dino_kd.errors import ConfigError, DataError

SUFFIXES = [".mp4", ".avi", ".mov", ".webm"]
CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4"}


def levels(count):
    """Brightness of each frame, far apart, so that lossy codecs keep their order."""
    return [40 + 170 * i // max(count - 1, 1) for i in range(count)]


def frames(count, height=48, width=64):
    return [np.full((height, width, 3), level, np.uint8) for level in levels(count)]


def film(path, count=6, rate=12, height=48, width=64):
    """Written by PyAV directly, not by our writer."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS.get(path.suffix, "libx264"), rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames(count, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def animation(path, count=5, duration=80):
    pictures = [Image.fromarray(frame) for frame in frames(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_frame_of_a_film_is_read_in_order(tmp_path, suffix):
    found = open_video(film(tmp_path / f"film{suffix}"))
    assert len(found) == 6
    assert found.seconds == pytest.approx(0.5, abs=0.01)
    assert found.second(3) == pytest.approx(0.25, abs=0.01)
    read = list(read_frames(found, 3))
    assert [frame.shape for frame in read] == [(48, 64, 3)] * 6
    assert [frame.mean() for frame in read] == pytest.approx(levels(6), abs=4)
    assert [f.mean() for f in read_frames(found, 3, step=4)] == [read[0].mean(), read[4].mean()]
    assert next(read_frames(found, 1)).shape == (48, 64, 1)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_need_no_further_library(tmp_path, suffix, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = animation(tmp_path / f"a{suffix}")
    assert is_video(path)
    found = open_video(path)
    assert found.durations == pytest.approx((0.08,) * 5)
    assert [f.mean() for f in read_frames(found, 3)] == pytest.approx(levels(5), abs=4)
    out = video_path(tmp_path / "out", found)
    write_video(out, iter(frames(5)), list(found.durations))
    again = open_video(out)
    assert again.durations == pytest.approx((0.08,) * 5)
    assert [f.shape for f in read_frames(again, 3)] == [(48, 64, 3)] * 5


def test_gif_is_written_where_pillow_has_no_webp(tmp_path, monkeypatch):
    monkeypatch.setattr(video.features, "check", lambda name: False)
    out = video_path(tmp_path / "out", open_video(animation(tmp_path / "a.gif")))
    assert out.suffix == ".gif"
    write_video(out, iter(frames(5)), [0.1] * 5)
    assert len(open_video(out)) == 5


def test_written_film_has_the_frames_and_even_sides(tmp_path):
    """49 x 65 pixels become 50 x 66: H.264 halves its colours. Read back by PyAV directly."""
    av = pytest.importorskip("av")
    path = tmp_path / "deep" / "film.mp4"
    write_video(path, iter(frames(7, 49, 65)), [0.04] * 7)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == Fraction(25)
    assert [frame.shape for frame in read] == [(50, 66, 3)] * 7
    assert [frame.mean() for frame in read] == pytest.approx(levels(7), abs=4)
    assert not list(path.parent.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize("name", ["film.mp4", "film.webp"])
def test_frames_are_not_collected_in_memory(tmp_path, name):
    """Counts the frames that are still held while the next one is made."""
    if name.endswith("mp4"):
        pytest.importorskip("av")
    made, alive = [], []

    def source():
        for frame in frames(20):
            fresh = frame.copy()
            alive.append(sum(reference() is not None for reference in made))
            made.append(weakref.ref(fresh))
            yield fresh
            del fresh

    write_video(tmp_path / name, source(), [0.1] * 20)
    assert len(alive) == 20
    assert max(alive) <= 3


def test_only_files_that_move_are_videos(tmp_path):
    Image.fromarray(frames(1)[0]).save(tmp_path / "still.gif")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    (tmp_path / "text.mp4").write_text("words")
    names = ["still.gif", "folder.mp4", "broken.gif", "absent.mp4"]
    assert not any(is_video(tmp_path / name) for name in names)
    assert is_video(tmp_path / "text.mp4")  # opening it says what is wrong


@pytest.mark.parametrize("content", [b"", b"just words\n" * 50])
def test_what_is_no_video_is_refused(tmp_path, content):
    pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"input: .*a\.mp4 cannot be read as a video"):
        open_video(path)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".gif"])
def test_cut_files_are_refused(tmp_path, suffix):
    make = animation if suffix == ".gif" else film
    path = make(tmp_path / f"a{suffix}", 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"input: .*(cannot be read as a video|cut short)"):
        open_video(path)


def test_a_file_without_pictures_is_refused(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.layout = "mono"
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="no video"):
        open_video(path)


def test_missing_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"anything")
    with pytest.raises(ConfigError, match=r"pip install 'dino_kd\[video\]'"):
        open_video(path)


def test_networks_of_other_channels_are_refused(tmp_path):
    with pytest.raises(DataError, match="4 channels cannot see them"):
        next(read_frames(open_video(animation(tmp_path / "a.gif")), 4))


def test_films_of_a_telephone_held_upright_are_turned(tmp_path):
    """The track's matrix is set by hand to a quarter turn clockwise: the top comes to the right."""
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24] = 220  # bright above
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # ISO 14496-12, track header of version 0
    assert struct.unpack(">9i", data[start : start + 36])[0] == 1 << 16
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[start : start + 36] = struct.pack(">9i", *turned)
    path.write_bytes(data)
    (frame,) = read_frames(open_video(path), 3)
    assert frame.shape == (64, 48, 3)
    assert frame[:, 30:].mean() > 200
    assert frame[:, :18].mean() < 20
