"""Settings: files, names, overrides, and one sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_kd.config import (
    HelpRequested,
    changed_settings,
    command_help,
    command_of,
    dump_settings,
    find_config,
    load_settings,
    packaged_configs,
    settings_page,
    value_at,
)
from dino_kd.describe import accepted, leaves
from dino_kd.errors import ConfigError
from dino_kd.schema import (
    COMMANDS,
    CROP_PRESETS,
    DistillConfig,
    FinetuneConfig,
    KnnConfig,
    PretrainConfig,
)

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["run_dir=runs/x", "data.train=/images"]
KNN_NEEDED = ["backbone=runs/x", "train=/a", "test=/b"]


def load(*words: str) -> PretrainConfig:
    return load_settings(PretrainConfig, [*NEEDED, *words], command="pretrain")


def problems(*words: str, needed: list[str] = NEEDED) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(PretrainConfig, [*needed, *words], command="pretrain")
    return caught.value.problems


# Values.


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.base_lr=1e-4", 1e-4),
        ("optim.min_lr=0", 0.0),
        ("optim.length=500", 500),
        ("optim.length=10ep", "10ep"),
        ("seed=010", 10),
        ("resume=auto", "auto"),
        ("resume=false", False),
        ("data.download=true", True),
        ("data.num_workers=0", 0),
        ("data.mean=[0.5, 1e-1]", [0.5, 0.1]),
        ("data.mean=", None),
        ("data.mean=none", None),
        ("data.mean=null", None),
        ("log.tracker=none", "none"),
        ("crops.global_size=[32, 64]", (32, 64)),
        ("crops.blur=[0, 0, 1]", (0.0, 0.0, 1.0)),
        ("run_dir=2024", "2024"),
        ("run_dir=on", "on"),
        ("data.train=/d/{000..127}.tar", "/d/{000..127}.tar"),
        ("data.train=a: #b", "a: #b"),
        ("model.init_from=none", None),
        ("device=cuda:1", "cuda:1"),
        ("optim={name: sgd}", None),
    ],
)
def test_overrides_are_typed_as_the_schema_asks(word: str, expected: Any) -> None:
    """Against the value a person means; text settings keep their text."""
    settings = load_settings(PretrainConfig, [*NEEDED, word], command="pretrain")
    path = word.partition("=")[0]
    if path == "optim":
        assert settings.optim.name == "sgd"
    else:
        value = value_at(settings, path)
        assert value == expected
        assert type(value) is type(expected)


def test_model_arguments_are_open() -> None:
    settings = load("model.args.depth=4", "model.args.init_values=1e-5")
    assert settings.model.args == {"depth": 4, "init_values": 1e-5}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\noptim: {base_lr: 1e-3, length: 5ep}\n")
    settings = load(str(file), "optim.length=7ep")
    assert (settings.seed, settings.optim.base_lr, settings.optim.length) == (1, 1e-3, "7ep")


def test_empty_sections_and_files_mean_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim:\n  # all of it is commented out\n")
    assert load(str(file)) == load()
    file.write_text("")
    assert load(str(file)) == load()


@pytest.mark.parametrize("preset", sorted(CROP_PRESETS))
def test_a_preset_on_the_command_line_replaces_stored_preset_values(
    preset: str, tmp_path: Path
) -> None:
    """Against a run that was started with that preset: the stored file holds every value."""
    file = tmp_path / "config.yaml"
    for stored in CROP_PRESETS:
        file.write_text(dump_settings(load(f"crops.preset={stored}", "crops.hue=0.05")))
        switched = load(str(file), f"crops.preset={preset}").crops
        fresh = load(f"crops.preset={preset}").crops
        assert switched.model_dump(exclude={"hue"}) == fresh.model_dump(exclude={"hue"})


# Where the base comes from.


def test_a_run_directory_is_a_config_and_knows_where_it_is(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(dump_settings(load("seed=3")))
    settings = load_settings(PretrainConfig, [str(moved), "resume=true"], command="pretrain")
    assert (settings.seed, settings.run_dir) == (3, str(moved))
    again = load_settings(PretrainConfig, [str(moved), "run_dir=new"], command="pretrain")
    assert again.run_dir == "new"


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_resume_without_config_takes_the_stored_settings(tmp_path: Path, resume: str) -> None:
    (tmp_path / "config.yaml").write_text(dump_settings(load("seed=3")))
    words = [f"run_dir={tmp_path}", f"resume={resume}"]
    assert load_settings(PretrainConfig, words, command="pretrain").seed == 3


def test_resume_of_a_run_that_does_not_exist_says_so(tmp_path: Path) -> None:
    (found, *_) = problems("resume=true", f"run_dir={tmp_path}", needed=[])
    assert "no run to resume" in found
    assert str(tmp_path) in found


def test_every_packaged_config_fits_its_command() -> None:
    names = packaged_configs()
    assert {"pretrain/vits16_imagenet", "pretrain/resnet18_cifar10", "eval/knn"} <= set(names)
    for name in names:
        if name.startswith("pretrain/"):
            load(name)
        elif name == "eval/knn":
            load_settings(KnnConfig, [name, *KNN_NEEDED], command="knn")
        elif name == "eval/finetune":
            words = [name, "run_dir=runs/y", *KNN_NEEDED]
            filled = load_settings(FinetuneConfig, words, command="finetune")
            assert filled == load_settings(FinetuneConfig, words[1:], command="finetune")


def test_every_packaged_config_opens_with_question_command_cost_and_result() -> None:
    for name in packaged_configs():
        text = find_config(name).read_text(encoding="utf-8")
        head = text.partition("\n\n")[0]
        assert "?" in head.splitlines()[0], name
        for word in ("dino_kd" if "torchrun" in head else "dino-kd ", "Cost:", "Result:"):
            assert word in head, (name, word)


def test_packaged_names_work_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("eval/knn").name == "knn.yaml"
    assert find_config("eval/knn.yaml") == find_config("eval/knn")


# Mistakes.


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("lr=3", ["lr: unknown", "got 3", "'optim.base_lr'"]),
        ("optim.lr=3", ["optim.lr: unknown", "'optim.base_lr'"]),
        ("optim.bsae_lr=3", ["optim.bsae_lr: unknown", "'optim.base_lr'"]),
        ("optmi.base_lr=3", ["optmi.base_lr: unknown", "'optim.base_lr'"]),
        ("batch_size=3", ["batch_size: unknown", "'optim.batch_size'"]),
        ("crops.batch_size=3", ["crops.batch_size: unknown", "'optim.batch_size'"]),
        ("sede=3", ["sede: unknown", "'seed'"]),
        ("optim.zzz=4", ["optim.zzz: unknown", "optim has: name, batch_size"]),
        ("zzz=4", ["zzz: unknown", "the top level has: run_dir, resume"]),
        ("optim.base_lr=-1", ["optim.base_lr: expected a number > 0, got -1"]),
        ("optim.base_lr=.inf", ["optim.base_lr: expected a number > 0, got inf"]),
        ("optim.base_lr=", ["optim.base_lr: expected a number > 0, got none"]),
        ("optim.base_lr=fast", ["optim.base_lr: expected a number > 0, got 'fast'"]),
        ("crops.hue=0.7", ["crops.hue: expected a number from 0 to 0.5, got 0.7"]),
        ("log.log_every=true", ["log.log_every: expected a whole number > 0, got true"]),
        ("log.log_every=2.5", ["log.log_every: expected a whole number > 0, got 2.5"]),
        ("data.download=maybe", ["data.download: expected true or false, got 'maybe'"]),
        ("data.num_workers=many", ["data.num_workers: expected auto or a whole number >= 0"]),
        ("crops.preset=smal", ["published, small or non_rgb, got 'smal'", "'small'"]),
        ("crops.global_size=[1,2,3]", ["crops.global_size: expected one side or [height, width]"]),
        ("crops.global_scale=[1,0.5]", ["crops.global_scale: the first number", "[1.0, 0.5]"]),
        ("crops.local_scale=[1,2]", ["crops.local_scale: expected [low, high]", "got [1, 2]"]),
        ("crops.blur=0.5", ["crops.blur: expected [global 1, global 2, locals]", "got 0.5"]),
        ("optim.warmup=ten", ["optim.warmup: expected a number of steps", "'10ep'", "'ten'"]),
        ("optim.length=5%", ["optim.length: expected steps (500) or epochs", "'5%'"]),
        ("optim.length=0", ["optim.length: expected more than 0, got 0"]),
        ("log.save_every=0ep", ["log.save_every: expected more than 0, got '0ep'"]),
        ("optim=3", ["optim: is a section, got '3'", "optim.name=VALUE"]),
        ("optim=", ["optim: is a section"]),
        ("optim.base_lr.x=3", ["optim.base_lr: expected a number > 0, got {x: 3}"]),
        ("data.mean=[0.5,", ["data.mean: expected a list of numbers or none, got '[0.5,'"]),
        ("monitor.train=/a", ["monitor: train is given and test is not"]),
        ("--epochs=3", ["--epochs 3: settings are written without dashes: optim.length=3ep"]),
        ("--optim.lr=3", ["without dashes: optim.base_lr=3"]),
        ("--batch-size=3", ["without dashes: optim.batch_size=3"]),
        ("--resume", ["without dashes: resume=true"]),
        ("--frobnicate", ["without dashes: a.b=c", "dino-kd pretrain --help"]),
        ("resume", ["'resume': a setting needs a value: resume=VALUE"]),
        ("lr", ["unknown config 'lr'", "optim.base_lr=VALUE"]),
        ("a =3", ["'a =3': a setting is written a.b=c, without spaces"]),
        ("pretrain/vits16_imagnet", ["unknown config", "'pretrain/vits16_imagenet'"]),
        ("vits16_imagenet", ["unknown config", "'pretrain/vits16_imagenet'"]),
        ("eval/knn", ["holds settings of dino-kd knn, not of dino-kd pretrain"]),
    ],
)
def test_each_mistake_is_one_sentence_with_key_value_and_what_is_accepted(
    word: str, parts: list[str]
) -> None:
    found = problems(word)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0], found[0]


def test_a_flag_with_a_separate_value_is_one_problem() -> None:
    (found,) = problems("--epochs", "3")
    assert found.startswith("--epochs 3: settings are written without dashes: optim.length=3ep")


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("optim: {bsae_lr: 1, clip_grad: -2}\nnosuch: {a: 1, b: 2}\nseed: no\n")
    words = [str(file), "--x", "crops.hue=9", "optim=3", "zzz=1"]
    found = problems(*words, needed=["run_dir=r"])
    starts = [
        "--x:", "optim:", "optim.bsae_lr:", "nosuch.a:", "nosuch.b:", "zzz:", "seed:",
        "data.train:", "crops.hue:", "optim.clip_grad:",
    ]  # fmt: skip
    assert sorted(p.split()[0] for p in found) == sorted(starts)
    assert all((f"in {file}" in p) == (p.split()[0].rstrip(":") in {
        "optim.bsae_lr", "optim.clip_grad", "nosuch.a", "nosuch.b", "seed"
    }) for p in found)  # fmt: skip


def test_missing_settings_come_with_an_example() -> None:
    found = problems(needed=[])
    assert found == [
        "run_dir: required, and not given; for example dino-kd pretrain run_dir=runs/first",
        "data.train: required, and not given; "
        "for example dino-kd pretrain data.train=/path/to/pictures",
    ]


def test_no_misspelt_setting_passes() -> None:
    """Every setting of every command, with two letters swapped and with one dropped."""
    for command, schema in COMMANDS.items():
        paths = {leaf.path for leaf in leaves(schema)}
        typos = set()
        for path in paths:
            section, dot, name = path.rpartition(".")
            typos |= {f"{section}{dot}{name}x", f"{section}x{dot}{name}"}
            if len(name) > 1:
                typos |= {f"{section}{dot}{name[1:]}", f"{section}{dot}{name[:-2]}{name[:-3:-1]}"}
        typos -= paths
        with pytest.raises(ConfigError) as caught:
            load_settings(schema, [f"{typo}=1" for typo in typos], command=command)
        refused = {p.partition(": unknown setting")[0] for p in caught.value.problems}
        assert typos <= refused


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  name: [sgd\nseed: 1\n", ["line 3"]),
        ("optim:\n\tname: sgd\n", ["line 2", "\\t"]),
        ("seed: 1\nseed: 2\n", ["line 2", "'seed' is given twice"]),
        ("- a\n- b\n", ["expected lines such as 'seed: 0'"]),
        ("just text", ["expected lines such as 'seed: 0'"]),
    ],
)
def test_unreadable_yaml_names_the_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    (found,) = problems(str(file))
    assert str(file) in found
    for part in parts:
        assert part in found


def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    (found,) = problems(str(file))
    assert "not UTF-8" in found


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    (found,) = problems(str(tmp_path))
    assert "holds no config.yaml" in found


def test_two_configs_are_refused() -> None:
    (found,) = problems("pretrain/folder", "eval/knn")
    assert "only one CONFIG" in found


def test_a_run_directory_given_to_knn_leads_to_backbone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_settings(load()))
    with pytest.raises(ConfigError, match=f"write backbone={tmp_path}"):
        load_settings(KnnConfig, [str(tmp_path), *KNN_NEEDED], command="knn")


# Writing and comparing.


@pytest.mark.parametrize(
    "text",
    ["1e5", "null", "~", "yes", "off", "a: b", "#x", "é", "0x10", "1_000", "12:30:45", "=", "<<",
     "[a]", "{a}", "'q'", '"', "a\nb", " a ", "010", "2024-01-01", "*x", "!x", "%", "-", "1.",
     ".5", "5%", ".inf", "C:\\x", "a\tb", "-1", "+.5e3", "1e", "no ne"],
)  # fmt: skip
def test_any_text_survives_the_file(text: str, tmp_path: Path) -> None:
    """config -> file -> config, with text that YAML would read as something else."""
    settings = PretrainConfig.model_validate({"run_dir": text, "data": {"train": text}})
    file = tmp_path / "config.yaml"
    file.write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(PretrainConfig, [str(file)], command="pretrain") == settings


def test_every_kind_of_value_survives_the_file(tmp_path: Path) -> None:
    settings = load(
        "pretrain/resnet18_cifar10", "optim.base_lr=1e-7", "crops.aspect_ratio=[0.333333333, 3]",
        "model.args={depth: 2, drop: 1e-30, flag: true, names: [a, 1e5]}",
        "data.mean=[0.1,0.2,0.3]", "resume=auto", "crops.global_size=[32,48]",
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(dump_settings(settings))
    assert load_settings(PretrainConfig, [str(file)], command="pretrain") == settings
    # and with another reader: plain PyYAML sees the same numbers
    assert yaml.safe_load(file.read_text())["optim"]["base_lr"] == 1e-7


def test_changed_settings_lists_the_difference_and_what_is_free() -> None:
    changes = changed_settings(load(), load("seed=1", "log.log_every=5", "crops.hue=0"))
    assert [tuple(change) for change in changes] == [
        ("seed", 0, 1, False),
        ("crops.hue", 0.1, 0.0, False),
        ("log.log_every", 10, 5, True),
    ]
    assert str(changes[0]) == "seed: 0 -> 1"
    assert changed_settings(load(), load()) == []


# Words.


def test_every_setting_says_what_it_means_and_accepts() -> None:
    for schema in COMMANDS.values():
        for path, field in leaves(schema):
            assert field.description, path
            assert accepted(field), path


def test_help_lists_every_setting_and_how_to_start() -> None:
    text = command_help("pretrain", PretrainConfig)
    assert text.startswith("usage: dino-kd pretrain [CONFIG] [a.b=c ...]")
    for path, _ in leaves(PretrainConfig):
        assert f"  {path}" in text
    assert "  optim.accumulate: a whole number > 0; default 1; may change on resume" in text
    assert max(map(len, text.splitlines())) <= 130
    with pytest.raises(HelpRequested, match="usage: dino-kd knn"):
        load_settings(KnnConfig, ["--help"], command="knn")


def test_a_misspelt_required_setting_is_one_mistake() -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(PretrainConfig, ["data.trian=/x", "run_dir=y"], command="pretrain")
    assert len(error.value.problems) == 1
    assert "did you mean 'data.train'" in error.value.problems[0]


def test_help_lists_the_configurations_that_a_command_takes() -> None:
    assert "  eval/suite\n" in command_help("evaluate", COMMANDS["evaluate"])
    assert "pretrain/folder" in command_help("bench", COMMANDS["bench"])
    assert "CONFIG is a YAML file.\n" in command_help("embed", COMMANDS["embed"])


def test_a_run_directory_tells_its_command(tmp_path: Path) -> None:
    assert command_of(tmp_path) == ""
    for command, schema in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        words = [*NEEDED] if command == "pretrain" else [*KNN_NEEDED, "run_dir=x"]
        text = dump_settings(load_settings(schema, words, command=command))
        (tmp_path / "config.yaml").write_text(text)
        assert command_of(tmp_path) == command
    (tmp_path / "config.yaml").write_text("x: [")
    assert command_of(tmp_path) == ""


def test_the_page_of_settings_is_up_to_date() -> None:
    """docs/config.md against the schema; `make docs` rewrites it."""
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == settings_page(), "run: make docs"


def test_settings_load_without_torch() -> None:
    code = (
        "import sys; from dino_kd.config import load_settings, command_help;"
        "from dino_kd.schema import PretrainConfig as P; import dino_kd.runlog;"
        "load_settings(P, ['run_dir=a', 'data.train=b'], command='pretrain');"
        "assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_one_seed_may_be_given_without_brackets() -> None:
    words = ["data.train=/a", "teacher.backbone=b", "student.backbone=c", "run_dir=d"]
    for given, seeds in (("3", [3]), ("3,4", [3, 4]), ("[3]", [3])):
        made = load_settings(DistillConfig, [*words, f"seeds={given}"], command="distill")
        assert made.seeds == seeds
    with pytest.raises(ConfigError, match=r"seeds: expected whole numbers with commas, got true"):
        load_settings(DistillConfig, [*words, "seeds=true"], command="distill")


def test_one_k_may_be_given_without_brackets() -> None:
    words = ["backbone=x", "train=a", "test=b", "k=20"]
    assert load_settings(KnnConfig, words, command="knn").k == [20]
