"""Prompts of telephone exchanges, read from tiny folders as Debian's packages unpack."""

import gzip

import datasets
import pytest
import torch
from typer.testing import CliRunner

from hf_xent import cli, speech
from hf_xent.data import asterisk, load, load_text
from hf_xent.hub import validate
from hf_xent.hub.datasets import export

EN = """; Core Asterisk Sounds in English

activated: Activated.
ascending-2tone: [ascending tones]
confbridge-join: <beep ascending>
digits/1: one
letters/at: at [@]
silence/1: (1 second of silence)
vm-intro: Leave a message.  Hang up. (simple tone sound plays)
menu: Press one (never, please), or two.
time: The time is: noon
no-sound: Nobody recorded this.
"""
FR = """; Core Asterisk Sounds in French

vm-intro: Laissez un message.
activated: activé
dir-welcome:
digits/1: un
only-french: Échec à l'ouverture.
"""
VOICES = {"en": ("en_US_f_Allison", EN), "fr": ("fr_CA_f_June", FR)}


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Files that `datasets` writes stay in a folder of the test run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def unpacked(root, language):
    """What `dpkg -x` makes of the two packages of a language."""
    voice, text = VOICES[language]
    document = root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    document.parent.mkdir(parents=True)
    document.write_bytes(gzip.compress(text.encode()))
    for line in text.splitlines():
        key = line.partition(":")[0]
        if ":" in line and key != "no-sound":
            file = root / f"usr/share/asterisk/sounds/{voice}/{key}.wav"
            speech.write_wav(file, torch.linspace(-0.5, 0.5, 80 + len(key)), 8000)
    return root


@pytest.fixture
def folder(tmp_path):
    for language in VOICES:
        unpacked(tmp_path / "sounds" / language, language)
    for name in ("b", "a"):
        file = tmp_path / f"sounds/moh/usr/share/asterisk/moh/{name}.wav"
        speech.write_wav(file, torch.zeros(100), 8000)
    return tmp_path / "sounds"


def test_prompts_are_what_is_spoken(folder):
    parts = load(f"asterisk:{folder}")
    assert list(parts) == ["en", "fr"] and parts["en"].column_names == ["key", "language", "text", "file"]
    assert dict(zip(parts["en"]["key"], parts["en"]["text"], strict=True)) == {
        "activated": "Activated.",
        "digits/1": "one",
        "letters/at": "at",
        "vm-intro": "Leave a message. Hang up.",
        "menu": "Press one (never, please), or two.",
        "time": "The time is: noon",
    }
    assert parts["fr"]["text"][:] == ["Laissez un message.", "activé", "un", "Échec à l'ouverture."]
    assert set(parts["fr"]["language"]) == {"fr"}
    waveform, rate = speech.read_wav(parts["en"]["file"][1])
    assert rate == 8000 and len(waveform) == 80 + len("digits/1")
    assert load("asterisk", folder, split="fr[1:2]").to_list() == [parts["fr"][1]]
    assert list(load("asterisk", folder, split="en", streaming=True)) == list(parts["en"])
    assert load_text(f"asterisk:{folder}", "fr")["text"][:] == parts["fr"]["text"][:]


def test_packages_may_be_unpacked_into_one_folder(tmp_path):
    for language in VOICES:
        unpacked(tmp_path, language)
    assert {name: len(rows) for name, rows in load(f"asterisk:{tmp_path}").items()} == {"en": 6, "fr": 4}


def test_parallel_prompts_share_their_key(folder):
    rows = asterisk.parallel(folder)
    assert rows.column_names == ["key", "text_en", "file_en", "text_fr", "file_fr"]
    assert rows["key"][:] == ["activated", "digits/1", "vm-intro"]
    assert rows["text_fr"][:] == ["activé", "un", "Laissez un message."]
    assert all(row["file_en"].endswith(f"en_US_f_Allison/{row['key']}.wav") for row in rows)
    assert all(row["file_fr"].endswith(f"fr_CA_f_June/{row['key']}.wav") for row in rows)
    assert asterisk.parallel(folder, "fr", "en")["key"][:] == ["vm-intro", "activated", "digits/1"]
    with pytest.raises(ValueError, match="source and target are both 'en'"):
        asterisk.parallel(folder, "en", "en")


def test_music_is_sorted_by_name(folder, tmp_path):
    assert [file.name for file in asterisk.music(folder)] == ["a.wav", "b.wav"]
    with pytest.raises(ValueError, match=r"no music is in .*: apt-get download asterisk-moh-opsound-wav"):
        asterisk.music(tmp_path / "none")


def test_what_is_missing_is_named_with_how_to_get_it(folder, tmp_path):
    with pytest.raises(ValueError, match=r"asterisk-core-sounds-LANGUAGE-wav .apt-get download"):
        load("asterisk")
    with pytest.raises(ValueError, match="no transcripts are there: apt-get download asterisk-core-sounds-en, then"):
        load(f"asterisk:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="no transcripts of the language 'it' are in"):
        asterisk.prompts(folder, "it")
    (folder / "en/usr/share/asterisk").rename(folder / "en/usr/share/elsewhere")
    with pytest.raises(ValueError, match=r"no sounds of the language 'en' .*: apt-get download .*-en-wav"):
        load(f"asterisk:{folder}")
    (folder / "en/usr/share/asterisk/sounds/en_US_f_Allison").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no .wav file of .*core-sounds-en.txt.gz is in .*en_US_f_Allison"):
        asterisk.prompts(folder, "en")
    transcript = folder / "en/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    transcript.write_bytes(gzip.compress(b"no colon here\n"))
    with pytest.raises(ValueError, match="has the line 'no colon here', which is not 'key: text'"):
        asterisk.prompts(folder, "en")


def test_an_export_has_the_texts_and_says_that_sounds_are_not_in_it(folder, tmp_path):
    out = export(f"asterisk:{folder}", tmp_path / "out")
    card = validate(out, "dataset")
    assert card.data.license == "cc-by-sa-3.0" and "the sounds are not in it" in card.text
    assert "| fr | 4 |" in card.text
    assert load("asterisk", out, split="fr").to_list() == load("asterisk", folder, split="fr").to_list()


def test_the_command_exports_them(folder, tmp_path):
    arguments = ["data", "export", f"asterisk:{folder}", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "asterisk:FOLDER" in CliRunner().invoke(cli.app, ["data", "export", "--help"], terminal_width=300).stdout
