"""From words to a job on paper: nothing is submitted, no Slurm is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_kd.errors import ConfigError, UserError
from dino_kd.schema import LaunchConfig, SlurmSettings
from dino_kd.schema.launch import minutes_of
from launch import cluster
from launch.batch import batch_file, request
from launch.job import Job, Point, find_jobs
from launch.request import plan_job, plan_sweep, slurm_settings, split
from launch.worker import describe_processes, tasks_on_node

FLAGS = {"--after": True, "--dry-run": False}


@pytest.fixture(autouse=True)
def no_site_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("DINO_KD_SLURM", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "dino_kd" / "slurm.yaml"


def job_of(slurm: SlurmSettings, **other: object) -> Job:
    points = [Point("a", "/runs/a", ["/runs/a/launch/config.yaml"])]
    values = {"slurm": {}, "cwd": Path("/work"), **other}
    return Job(Path("/runs/a/launch"), "pretrain", points, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 90.5), ("12:00:00", 720), ("1-12", 2160), ("1-12:30", 2190),
     ("2-0:0:30", 2880.5), ("UNLIMITED", float("inf"))],
)  # fmt: skip
def test_durations_are_slurms(text: str, minutes: float) -> None:
    """Against the table in sbatch's manual page."""
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "1 day", "1h", "-5", "1-2-3"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"days-hours \(1-12\)"):
        minutes_of(text)


def test_the_command_line_wins_over_the_users_file(no_site_file: Path) -> None:
    no_site_file.parent.mkdir()
    no_site_file.write_text("slurm: {partition: long, nodes: 4}\n")
    slurm = slurm_settings(["slurm.nodes=2"], {"qos": "low"})
    assert (slurm.partition, slurm.nodes, slurm.qos) == ("long", 2, "low")


def test_a_named_users_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_KD_SLURM", "/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"DINO_KD_SLURM: there is no file /nowhere\.yaml"):
        slurm_settings([])


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("slurm.partion=x", ["slurm.partion", "slurm.partition"]),
        ("slurm.nodes=0", ["slurm.nodes", "0"]),
        ("slurm.time=soon", ["slurm.time", "soon", "days-hours"]),
        ("slurm.mem=lots", ["slurm.mem", "lots", "K, M, G, T"]),
    ],
)
def test_mistakes_in_the_request_are_named(word: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm_settings([word])
    for part in parts:
        assert part in str(caught.value)


def test_flags_slurm_words_and_grids_are_sorted() -> None:
    words = split(["pretrain", "a.b=1", "slurm.nodes=2", "grid.x=[1]", "--after", "7"], FLAGS)
    assert words.rest == ["pretrain", "a.b=1"]
    assert (words.slurm, words.grid) == (["slurm.nodes=2"], {"x": "[1]"})
    assert words.flags == {"--after": "7"}
    assert split(["x", "--after", "a=1"], FLAGS).flags == {"--after": ""}
    with pytest.raises(ConfigError, match="did you mean '--dry-run'"):
        split(["--dryrun"], FLAGS)


def test_a_production_request_is_written_as_sbatch_reads_it() -> None:
    slurm = SlurmSettings(
        nodes=2, gpus_per_node=8, cpus_per_task=10, mem="0", extra={"mail-type": "END", "x": True}
    )
    options = request(job_of(slurm), slurm)
    expected = {
        "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "10",
        "mem": "0", "signal": "B:USR2@300", "requeue": None, "open-mode": "append",
        "mail-type": "END", "x": None, "job-name": "pretrain-a", "chdir": "/work",
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert "partition" not in options


def test_dependencies_end_when_they_can_never_be_met() -> None:
    slurm = SlurmSettings()
    options = request(job_of(slurm, after=["7", "8"]), slurm)
    assert (options["dependency"], options["kill-on-invalid-dep"]) == ("afterok:7:8", "yes")
    options = request(job_of(slurm, after=["7"], task_by_task=True), slurm)
    assert options["dependency"] == "aftercorr:7"


@pytest.mark.parametrize(
    ("key", "advice"), [("signal", "slurm.warn"), ("job_name", "slurm.job_name")]
)
def test_what_the_launcher_decides_cannot_be_overridden(key: str, advice: str) -> None:
    slurm = SlurmSettings(extra={key: "x"})
    with pytest.raises(ConfigError, match=f"slurm.extra.{key}: use {advice}"):
        request(job_of(slurm), slurm)


def test_the_batch_file_is_sound_shell(tmp_path: Path) -> None:
    """By bash itself, with a hostile folder name."""
    slurm = SlurmSettings(cpus_per_task=2, setup=["module load x"])
    folder = tmp_path / "it's 100% $HOME"
    job = Job(folder, "pretrain", [Point("a", str(folder), [])], tmp_path, {}, is_array=True)
    text = batch_file(job, slurm)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100%% " in text.partition("job_dir=")[0]
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_a_run_that_exists_is_not_continued_in_silence(tmp_path: Path) -> None:
    words = ["run_dir=r", "data.train=/images"]
    plan = plan_job("pretrain", words, SlurmSettings())
    assert plan.job.job_dir == tmp_path / "r" / "launch"
    assert yaml.safe_load(plan.configs[0])["resume"] == "auto"
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="already holds a run; add resume=auto"):
        plan_job("pretrain", words, SlurmSettings())
    plan_job("pretrain", [*words, "resume=auto"], SlurmSettings())


def test_unknown_commands_and_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pretrain'"):
        plan_job("pretrian", [], SlurmSettings())
    with pytest.raises(ConfigError, match=r"optim\.base_lr"):
        plan_job("pretrain", ["run_dir=r", "data.train=/x", "optim.lr=1"], SlurmSettings())
    with pytest.raises(ConfigError, match=r"slurm\.job_dir: where"):
        plan_job("knn", ["backbone=pixels", "train=/a", "test=/b"], SlurmSettings())


def test_a_grid_is_a_product_and_keeps_numbers_as_written(tmp_path: Path) -> None:
    words = split(
        ["run_dir=s", "data.train=/x", "grid.optim.base_lr=[1e-4, 2e-4]", "grid.seed=[1, 2, 3]"], {}
    )
    plan = plan_sweep("pretrain", words, SlurmSettings())
    assert [point.name for point in plan.job.points] == list("012345")
    assert plan.job.points[4].settings == {"optim.base_lr": "2e-4", "seed": "2"}
    made = yaml.safe_load(plan.configs[4])
    assert (made["optim"]["base_lr"], made["seed"]) == (2e-4, 2)
    assert made["run_dir"] == str(tmp_path / "s" / "4")
    assert request(plan.job, SlurmSettings(parallel=2))["array"] == "0-5%2"


def test_mistakes_of_a_sweep_name_the_point(tmp_path: Path) -> None:
    words = split(["run_dir=s", "data.train=/x", "grid.seed=[1, -1]"], {})
    with pytest.raises(ConfigError, match=r"point 1: seed"):
        plan_sweep("pretrain", words, SlurmSettings())
    words = split(["run_dir=s", "data.train=/x", "grid.seed=3"], {})
    with pytest.raises(ConfigError, match=r"grid\.seed: expected a list such as \[1, 2\], got '3'"):
        plan_sweep("pretrain", words, SlurmSettings())
    (tmp_path / "p.yaml").write_text("seed: 1\n")
    words = split(["run_dir=s", "data.train=/x", "--points", "p.yaml"], {"--points": True})
    with pytest.raises(ConfigError, match="should be a list such as"):
        plan_sweep("pretrain", words, SlurmSettings())


def test_packaged_launch_files_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_kd.config import find_config, load_settings
    from launch import pipeline

    for name in ("launch/site", "launch/production"):
        load_settings(LaunchConfig, [name], command="launch")
    stages = pipeline.read(["launch/pipeline"], [])
    assert [(stage.name, stage.after) for stage in stages] == [
        ("pretrain", []), ("evaluate", ["pretrain"]), ("distill", ["pretrain"]),
        ("evaluate_student", ["distill"]),
    ]  # fmt: skip
    assert stages[1].plan.slurm.gpus_per_node == 1
    points = split(["run_dir=s", "data.train=/x", "--points", str(find_config("launch/sweep"))],
                   {"--points": True})  # fmt: skip
    assert len(plan_sweep("pretrain", points, SlurmSettings()).job.points) == 3


def test_a_pipeline_takes_any_command_and_its_teacher_from_an_earlier_stage(
    tmp_path: Path,
) -> None:
    """pretrain -> evaluate -> distill twice -> evaluate."""
    from launch import pipeline

    data = {"data.train": "/a"}
    score = {"train": "/a", "test": "/b"}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": {"command": "pretrain", "settings": {"data.train": "/a"}},
        "score": {"command": "evaluate", "settings": {**score, "backbone": "{pretrain}"}},
        "dotted": {"command": "distill", "settings": {**data, "teacher.backbone": "{pretrain}"}},
        "nested": {
            "command": "distill",
            "settings": {**data, "teacher": {"backbone": "{pretrain}"}},
        },
        "end": {"command": "evaluate", "settings": {**score, "backbone": "{dotted}"}},
    }
    file = tmp_path / "p.yaml"
    file.write_text(
        yaml.safe_dump({"folder": str(tmp_path / "p"), "stages": stages}, sort_keys=False)
    )
    read = {stage.name: stage for stage in pipeline.read([str(file)], [])}
    for name in ("dotted", "nested"):
        settings = yaml.safe_load(read[name].plan.configs[0])
        assert settings["teacher"]["backbone"] == str(tmp_path / "p" / "pretrain")
        assert settings["run_dir"] == str(tmp_path / "p" / name)
        assert settings["resume"] == "auto"
    assert yaml.safe_load(read["end"].plan.configs[0])["backbone"] == str(tmp_path / "p" / "dotted")
    # a stage waits for the one before it and for those whose folders it takes
    assert {name: stage.after for name, stage in read.items()} == {
        "pretrain": [], "score": ["pretrain"], "dotted": ["score", "pretrain"],
        "nested": ["dotted", "pretrain"], "end": ["nested", "dotted"],
    }  # fmt: skip


def test_a_pipeline_stage_builds_on_earlier_ones_only(tmp_path: Path) -> None:
    from launch import pipeline

    stages = {
        "a": {"command": "pretrain", "settings": {"data.train": "/a", "model.init_from": "{b}"}},
        "b": {"command": "pretrain", "after": ["b"], "settings": {"data.train": "/a"}},
    }
    file = tmp_path / "p.yaml"
    file.write_text(
        yaml.safe_dump({"folder": str(tmp_path / "p"), "stages": stages}, sort_keys=False)
    )
    with pytest.raises(ConfigError) as caught:
        pipeline.read([str(file)], [])
    assert "stages.a: {b}: stage 'b' does not come before this one" in str(caught.value)
    assert "stages.b.after: stage 'b' does not come before this one" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "node", "tasks"), [("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("8", 0, 8)]
)
def test_tasks_of_a_node_are_read_from_slurms_short_form(text: str, node: int, tasks: int) -> None:
    assert tasks_on_node(text, node) == tasks


def test_ranks_follow_srun_and_gpus_stay_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    given = {
        "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "2,5",
        "RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    describe_processes()
    found = [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    assert found == ["3", "4", "1", "2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # one GPU of its own: that is number 0
    describe_processes()
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_nested_launch_keeps_the_way_to_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "x")
    kept = cluster.outside_a_job()
    assert kept["SLURM_CONF"] == "/etc/slurm.conf"
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION"} & set(kept)


def test_without_slurm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match=r"there is no Slurm here: squeue is not on the PATH.*--local"
    ):
        cluster.queue("1")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("sbatch: error: Requested node configuration is not available",
         "no node has the CPUs, GPUs or memory"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)",
         "controller does not answer"),
        ("sbatch: unrecognized option '--frob=1'", "look at slurm.extra"),
    ],
)  # fmt: skip
def test_slurms_errors_come_with_advice(words: str, part: str) -> None:
    assert part in cluster.explain("sbatch", words)


def test_accounts_come_from_the_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the tools of a site with accounting."""
    tool(tmp_path, "scontrol", "PartitionName=gpu Default=YES TotalNodes=4 MaxTime=1-00:00:00")
    tool(tmp_path, "sacctmgr", "vision\nspeech")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError) as caught:
        cluster.check_request(
            SlurmSettings(partition="gpus", account="visoin", nodes=5, time="2-0", warn=60)
        )
    text = str(caught.value)
    assert "slurm.partition: unknown partition 'gpus'; did you mean 'gpu'?" in text
    assert "slurm.account: unknown account 'visoin'; did you mean 'vision'?" in text
    assert "5 nodes would wait for ever, partition gpu gives a job at most 4" in text
    assert "2-0 would wait for ever, partition gpu allows 1440 minutes" in text


def test_an_unknown_qos_is_named_with_those_of_every_association(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacctmgr prints the QOS of an association in one line, separated by commas."""
    tool(tmp_path, "scontrol", "PartitionName=gpu Default=YES TotalNodes=4 MaxTime=UNLIMITED")
    tool(tmp_path, "sacctmgr", "normal,high\nnormal,scavenge\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError) as caught:
        cluster.check_request(SlurmSettings(qos="hihg"))
    assert "slurm.qos: unknown qos 'hihg'; did you mean 'high'?" in str(caught.value)
    assert "Accepted: high, normal, scavenge." in str(caught.value)
    cluster.check_request(SlurmSettings(qos="scavenge"))


def test_a_warning_longer_than_the_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "scontrol", "PartitionName=a Default=YES TotalNodes=4 MaxTime=UNLIMITED")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match=r"slurm\.warn: 300 s before a time limit of 5 minutes"):
        cluster.check_request(SlurmSettings(time="5"))
    cluster.check_request(SlurmSettings())


def tool(folder: Path, name: str, output: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'EOF'\n{output}\nEOF\n")
    path.chmod(0o755)


def test_damaged_and_missing_job_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no job; name a run directory"):
        find_jobs([str(tmp_path)])
    (tmp_path / "run" / "launch").mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is no folder .*/runn; did you mean 'run'"):
        find_jobs([str(tmp_path / "runn")])
    (tmp_path / "run" / "launch" / "job.json").write_text(json.dumps({"points": 3}))
    with pytest.raises(UserError, match=r"job\.json cannot be read"):
        find_jobs([str(tmp_path)])


def test_the_launcher_starts_without_torch() -> None:
    code = "import sys, launch.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
