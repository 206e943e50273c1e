"""The image: what is written down about it, and (where tests/docker/ci.sh built one) what it does when used."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
import yaml
from browser.conftest import browser  # noqa: F401 (a fixture)
from test_project import ROOT, declared

DOCKERFILE = ROOT / "docker" / "Dockerfile"
CLUSTER_DOCKERFILE = ROOT / "docker" / "cluster" / "Dockerfile"
README = ROOT / "docker" / "README.md"
SCRIPTS = sorted((ROOT / "docker").glob("*.sh")) + [
    *(ROOT / ".ci" / name for name in ("run", "stages", "test")),
    ROOT / "tests" / "docker" / "ci.sh",
    ROOT / "tests" / "docker" / "offline_docker",
]
CLUSTER_SCRIPTS = [ROOT / "docker" / "cluster" / name for name in ("slurm.sbatch", "eval_lm.sbatch")]
SCRIPTS += CLUSTER_SCRIPTS
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
DOCKER = os.environ.get("DOCKER", "docker")
IMAGE = os.environ.get("MOEKIT_TEST_IMAGE")
# An ordinary user of this machine, but not the image's own 1000.
UID = GID = 4321

in_container = pytest.mark.skipif(not IMAGE, reason="needs the image: make image-test")


def run(*command, check=True, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, **kwargs
    )
    assert not check or done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done


# ------------------------------------------------------------------------------------------------ without an engine


def test_linters_find_nothing():
    tools = Path(sys.executable).parent
    assert run(tools / "hadolint", DOCKERFILE, CLUSTER_DOCKERFILE).stdout == ""
    assert run(tools / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS).stdout == ""


def test_dockerfile_holds_the_projects_pins():
    text = DOCKERFILE.read_text()
    for name in ("PIP", "TORCH"):
        pin = re.search(rf"^ARG {name}=(\S+)$", text, re.M)[1]
        assert f"{name} := {pin}\n" in (ROOT / "Makefile").read_text()
    assert "--require-hashes -r /tmp/requirements.lock" in text


def test_build_context_holds_what_the_dockerfile_copies_and_no_more():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    used = set()
    for line in (DOCKERFILE.read_text() + CLUSTER_DOCKERFILE.read_text()).splitlines():
        copied = re.fullmatch(r"COPY ((?:\S+ )+)\S+", line)
        if copied:
            used |= set(copied[1].split())
        used |= set(re.findall(r"type=bind,source=([^,\s]+)", line))
    assert {name for name in used if not any((name + "/").startswith(a + "/") for a in allowed)} == set()
    assert {a for a in allowed if not any((name + "/").startswith(a + "/") for name in used)} == set()


def test_the_cluster_of_containers_publishes_nothing_but_jupyterlab_and_asks_for_a_token():
    cluster = yaml.safe_load((ROOT / "docker" / "compose.cluster.yaml").read_text())
    head, worker = cluster["services"]["head"], cluster["services"]["worker"]
    assert worker["deploy"]["replicas"] == 2
    assert head["ports"] == ["127.0.0.1:${MOEKIT_PORT:-8888}:8888"] and "ports" not in worker
    assert cluster["networks"]["nodes"]["internal"] and worker["networks"] == ["nodes"]
    for service in (head, worker):
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["secrets"] == ["ray_token"]
        # No process is root's, those of `exec` included.
        assert service["user"] == "${NB_UID:-1000}:${NB_GID:-1000}" and service["cap_drop"] == ["ALL"]
        assert service["environment"]["RAY_ADDRESS"] == "ray-head:6379"
    # Workers know the head by a name that has one address: the head has two networks.
    assert head["networks"]["nodes"]["aliases"] == ["ray-head"]
    # All nodes see the same files.
    assert head["volumes"] == worker["volumes"] == COMPOSE["services"]["cpu"]["volumes"]
    assert_ray_options(
        "ray start " + re.search(r"ray start (.*?) &&", " ".join(head["command"][2].split()))[1]
    )
    assert_ray_options(worker["command"])


def assert_ray_options(command: str) -> None:
    """That the installed Ray knows every option of a ``ray start``."""
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    options = re.findall(r"--[a-z-]+", command)
    assert options and set(options) <= known, set(options) - known


def test_the_manifest_for_kubernetes_is_one_of_kuberay():
    ray, policy = yaml.safe_load_all((ROOT / "docker" / "cluster" / "kuberay.yaml").read_text())
    assert (ray["apiVersion"], ray["kind"]) == ("ray.io/v1", "RayCluster")
    version = re.search(r'"ray\[default\]==(\S+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert ray["spec"]["rayVersion"] == version
    groups = [ray["spec"]["headGroupSpec"], *ray["spec"]["workerGroupSpecs"]]
    mounts = []
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        secret = next(entry for entry in container["env"] if entry["name"] == "RAY_AUTH_TOKEN")["valueFrom"]
        assert secret["secretKeyRef"]["name"] == "moekit-ray-token"
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        mounts.append(container["volumeMounts"])
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert_ray_options(
            "ray start " + " ".join(f"--{name}" for name in group["rayStartParams"]) + " --block"
        )
    assert mounts[0] == mounts[1], "all pods see the same files"
    limits = ray["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == 8
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/cluster": ray["metadata"]["name"]}}


def test_the_scripts_for_slurm_say_what_sbatch_and_ray_understand():
    known = set(
        "job-name nodes ntasks-per-node gpus-per-node cpus-per-task exclusive time distribution".split()
    )
    for script in CLUSTER_SCRIPTS:
        text = script.read_text()
        asked = re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)
        assert {"nodes", "ntasks-per-node", "time"} <= set(asked) <= known
        for command in re.findall(r"\b(ray start .*?)(?:\n|$)", text):
            assert_ray_options(command)
    ray, plain = (script.read_text() for script in CLUSTER_SCRIPTS)
    assert "-p ranks ray" in ray and "RAY_AUTH_MODE=token" in ray
    # What eval_lm reads of a launcher.
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(
        re.findall(r"\b([A-Z_]+)=", plain)
    )


def test_compose_reserves_gpus_and_stays_on_this_machine():
    lab, cpu = COMPOSE["services"]["lab"], COMPOSE["services"]["cpu"]
    (device,) = lab["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for service in (lab, cpu):
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert [v for v in service["volumes"] if v.endswith(":/data:ro")]
    assert "deploy" not in cpu


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A docker that writes down its arguments, a list a call, and fails as it is told to."""
    calls = tmp_path / "calls"
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(
        "#!/usr/bin/env python3\n"
        "import json, os, sys\n"
        f"open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"
        "says = json.loads(os.environ['SAYS'])\n"
        "said = says.get(sys.argv[1], '')\n"
        "code, text = said if isinstance(said, list) else (0, said)\n"
        "print(text, file=sys.stderr if code else sys.stdout)\n"
        "sys.exit(code)\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER", raising=False)

    def call(script, *arguments, **says):
        calls.unlink(missing_ok=True)
        done = run(
            ROOT / "docker" / script, *arguments, check=False, env=os.environ | {"SAYS": json.dumps(says)}
        )
        made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done, made

    return call


def options_of(calls) -> list[str]:
    (made,) = [call for call in calls if call[0] == "run"]
    return made


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("all", ["--gpus", "all"]),
        ("0,2", ["--gpus", '"device=0,2"']),
        ("none", ["--env", "NVIDIA_VISIBLE_DEVICES=void"]),
    ],
)
def test_run_hands_over_gpus_data_and_work(engine, tmp_path, gpus, expected):
    (tmp_path / "models").mkdir()
    done, calls = engine(
        "run.sh", "--gpus", gpus, "--data", tmp_path / "models", "--", "papermill", "a b.ipynb"
    )
    assert done.returncode == 0, done.stderr
    made = options_of(calls)
    text = " ".join(made)
    assert " ".join(expected) in text
    assert f"--volume {tmp_path / 'models'}:/data:ro" in text
    assert f"--volume {tmp_path / 'moekit'}:/work" in text
    assert (tmp_path / "moekit").is_dir()
    assert "--shm-size 16g" in text
    assert made[-3:] == ["moekit", "papermill", "a b.ipynb"]
    assert "--publish" not in made


def test_run_uses_podmans_own_words(engine, tmp_path):
    (tmp_path / "bin" / "docker").rename(tmp_path / "bin" / "podman")
    # The fixture takes it away again.
    os.environ["DOCKER"] = "podman"
    done, calls = engine("run.sh", "--gpus", "0,2", "--", "true")
    assert done.returncode == 0, done.stderr
    text = " ".join(options_of(calls))
    assert "--device nvidia.com/gpu=0 --device nvidia.com/gpu=2" in text
    assert "--gpus" not in text


def test_run_publishes_on_this_machine_only_unless_asked(engine):
    asked = {"container": "running moekit", "port": "127.0.0.1:8888", "exec": "token"}
    done, calls = engine("run.sh", **asked)
    assert done.stdout.split().count("http://127.0.0.1:8888/?token=token") == 1
    refused = {"container": [1, ""], "run": [125, "Bind for 0.0.0.0:8888 failed: port is already allocated"]}
    done, calls = engine("run.sh", **refused)
    assert "--publish 127.0.0.1:8888:8888" in " ".join(options_of(calls))
    done, calls = engine("run.sh", "--bind", "0.0.0.0", "--port", "9000", **refused)
    assert "--publish 0.0.0.0:9000:8888" in " ".join(options_of(calls))


# Another tag is one of the same image: the README makes moekit:mine of moekit.
@pytest.mark.parametrize(
    "image",
    ["moekit", "moekit:latest", "moekit:old", "localhost/moekit:latest", "moekit:1@sha256:" + "0" * 64],
)
def test_run_takes_the_place_of_its_own_container_that_has_ended(engine, image):
    _, calls = engine("run.sh", container=f"exited {image}")
    assert [call[0] for call in calls if call[0] in ("rm", "run")] == ["rm", "run"]


def test_run_says_which_image_runs_already(engine):
    done, calls = engine(
        "run.sh", "--image", "moekit:mine", container="running moekit:old", port="127.0.0.1:8888"
    )
    assert "moekit runs already, from moekit:old; for another tag " in done.stdout
    assert not {call[0] for call in calls} & {"rm", "run"}


def test_run_takes_no_image_without_a_name_for_another_one(engine):
    one, other = ("sha256:" + number * 64 for number in "01")
    done, calls = engine("run.sh", "--image", one, container=f"exited {other}")
    assert done.returncode != 0 and f"the container moekit is of another image, {other}:" in done.stderr
    assert not {call[0] for call in calls} & {"rm", "run"}
    _, calls = engine("run.sh", "--image", one, container=f"exited {one}")
    assert [call[0] for call in calls if call[0] in ("rm", "run")] == ["rm", "run"]


@pytest.mark.parametrize("state", ["exited", "running"])
@pytest.mark.parametrize("image", ["postgres:16", "example.org/moekit"])
def test_run_leaves_a_container_of_another_image_alone(engine, state, image):
    done, calls = engine("run.sh", "--name", "study", container=f"{state} {image}")
    assert done.returncode != 0 and f"the container study is of another image, {image}:" in done.stderr
    assert "--name NAME" in done.stderr and "docker rm study" in done.stderr
    assert not {call[0] for call in calls} & {"rm", "run", "exec"}


@pytest.mark.parametrize(
    ("arguments", "says", "said"),
    [
        (["--gpus", "two"], {}, "--gpus two: expected all, none, or numbers such as 0,2"),
        (["--port"], {}, "--port needs a value"),
        (["--gpu", "all"], {}, "--gpu is none of its options"),
        (["--port", "http"], {}, "--port http: expected a number such as 8888"),
        (["--work", ""], {}, "--work needs a value"),
        (["--data", "/nowhere"], {}, "--data /nowhere: no such folder"),
        (["--data", __file__], {}, f"--data {__file__}: no such folder"),
        (["--work", __file__], {}, f"--work {__file__} is a file; expected a folder"),
        (
            ["--work", f"{__file__}/below"],
            {},
            f"--work {__file__}/below: there is no such folder, and none can be made",
        ),
        (["--work", "/tmp/a:b"], {}, "--work /tmp/a:b: Docker mounts no folder with a colon in its path"),
        (
            [],
            {"version": [1, "Cannot connect to the Docker daemon. Is the docker daemon running?"]},
            "systemctl start",
        ),
        ([], {"version": [1, "permission denied while trying to connect"]}, "usermod -aG docker"),
        ([], {"image": [1, "No such image"]}, "docker/build.sh makes it"),
        ([], {"run": [125, "Bind for 127.0.0.1:8888 failed: port is already allocated"]}, "--port 8889"),
        (
            ["--gpus", "all"],
            {"run": [125, 'could not select device driver "" with capabilities: [[gpu]].']},
            "install the NVIDIA Container Toolkit",
        ),
        (
            ["--gpus", "all"],
            {"run": [125, "nvidia-container-cli: initialization error: nvml error: driver not loaded"]},
            "the NVIDIA driver on this machine does not answer",
        ),
        (["--bind", "10.9.9.9"], {"run": [125, "bind: cannot assign requested address"]}, "no such address"),
    ],
)
def test_run_says_what_to_do(engine, arguments, says, said):
    done, _ = engine("run.sh", *arguments, **{"container": [1, ""]} | says)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def test_run_says_what_to_do_without_a_home(engine, tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    done, calls = engine("run.sh", "--", "true")
    assert (done.returncode, calls) == (1, [])
    assert (
        done.stderr
        == "run.sh: HOME is not set, so there is no ~/moekit to work in; name a folder: --work DIR\n"
    )
    done, calls = engine("run.sh", "--work", tmp_path / "work", "--", "true")
    assert done.returncode == 0, done.stderr
    assert f"--volume {tmp_path / 'work'}:/work" in " ".join(options_of(calls))


def test_a_folder_of_data_whose_path_has_a_colon(engine, tmp_path):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a:b")
    for folder in (tmp_path / "a:b", tmp_path / "link"):
        done, calls = engine("run.sh", "--data", folder)
        assert (done.returncode, calls) == (1, [])
        assert done.stderr.startswith(f"run.sh: --data {tmp_path}/a:b: Docker mounts no folder with a colon")


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_token_file_without_a_token_is_refused(tmp_path, content):
    """Before anything is done in the work folder, which is this machine's here."""
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    variables = {"NB_UID": "0", "NB_GID": "0", "HOME": str(tmp_path), "JUPYTER_TOKEN_FILE": str(file)}
    environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN"} | variables
    done = run(ROOT / "docker" / "entrypoint.sh", "echo", "started", check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"moekit: JUPYTER_TOKEN_FILE={file} holds no token")
    assert done.stderr.count("\n") == 1


def test_check_gpu_makes_five_checks_and_ends_at_the_first_that_fails(engine):
    done, calls = engine("check_gpu.sh", "--shm", "8g")
    made = [call for call in calls if call[0] == "run"]
    assert done.returncode == 0, done.stderr
    assert [call[call.index("moekit") + 1] for call in made] == [
        "nvidia-smi",
        "python",
        "bash",
        "python",
        "papermill",
    ]
    assert all("--gpus all" in " ".join(call) and "--shm-size 8g" in " ".join(call) for call in made)
    compile(made[1][-1], "torch", "exec")
    compile(made[3][-1], "nccl", "exec")
    done, calls = engine("check_gpu.sh", run=[1, "no GPU"])
    assert done.returncode == 1
    assert len([call for call in calls if call[0] == "run"]) == 1


def test_scripts_say_how_to_install_docker(tmp_path):
    for script in ("run.sh", "build.sh"):
        done = run(ROOT / "docker" / script, check=False, env=os.environ | {"DOCKER": "no-such-docker"})
        assert done.returncode == 1
        assert "sudo apt-get install docker.io" in done.stderr


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ({"buildx": [1, "unknown"], "version": "28.2.2"}, "sudo apt-get install docker-buildx"),
        ({"buildx": [1, "unknown"], "version": "20.10.24+dfsg1"}, None),
        ({"version": "28.2.2"}, None),
    ],
)
def test_build_needs_buildkit(engine, says, said):
    done, calls = engine("build.sh", "--ca", ROOT / "LICENSE", **says)
    built = [call for call in calls if call[0] == "build"]
    if said:
        assert said in done.stderr
        assert not built
    else:
        assert f"--secret id=ca,src={ROOT / 'LICENSE'}" in " ".join(built[0])


# ----------------------------------------------------------------------------------------------------- in the image


def ordinary(home: Path) -> dict:
    """How subprocess starts a command as a user of this machine who may use Docker."""
    if os.getuid() != 0:
        return {"env": os.environ | {"HOME": str(home)}}
    socket = Path("/var/run/docker.sock").stat()
    return {
        "user": UID,
        "group": GID,
        "extra_groups": [socket.st_gid],
        "env": os.environ | {"HOME": str(home)},
    }


@pytest.fixture(scope="module")
def home():
    """The home folder of an ordinary user, with the scripts in it, in a place where that user may read."""
    folder = Path(tempfile.mkdtemp(prefix="moekit-test-", dir="/tmp"))
    shutil.copytree(ROOT / "docker", folder / "docker", ignore=shutil.ignore_patterns("work", "data"))
    shutil.copy(ROOT / "tests" / "docker" / "offline_docker", folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
        if os.getuid() == 0:
            os.chown(path, UID, GID)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def offline():
    """Docker, whose containers the host reaches and which reach nothing."""
    run(DOCKER, "network", "create", "--internal", "moekit-offline", check=False)
    yield {"DOCKER": "./offline_docker", "ONLINE_DOCKER": DOCKER}
    run(DOCKER, "network", "rm", "moekit-offline", check=False)


@pytest.fixture(scope="module")
def start(home, offline):
    """Starts docker/run.sh as an ordinary user, its containers offline; ends what was left."""
    names = []

    def call(*arguments, check=True, timeout=300):
        as_user = ordinary(home)
        as_user["env"] |= offline
        names.append(dict(itertools.pairwise(arguments)).get("--name", "moekit"))
        return run(
            "docker/run.sh", "--image", IMAGE, *arguments, check=check, timeout=timeout, cwd=home, **as_user
        )

    yield call
    for name in set(names):
        run(DOCKER, "rm", "--force", name, check=False)


class Lab:
    """A running JupyterLab, reached from the host."""

    def __init__(self, name: str, work: Path, said: str):
        self.name, self.work = name, work
        self.address, self.token = re.search(r"(http://[\d.:]+)/\?token=(\w+)", said).groups()

    def get(self, path: str, token: str | None = None, data: bytes | None = None, method: str | None = None):
        headers = {"Authorization": f"token {token}"} if token else {}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    def python(self, code: str, *arguments: str) -> str:
        """What ``code`` prints, run inside as the user."""
        return run(
            DOCKER,
            "exec",
            "--interactive",
            "--user",
            f"{UID}:{GID}",
            self.name,
            "python",
            "-",
            *arguments,
            input=code,
        ).stdout


@pytest.fixture(scope="module")
def lab(start, home):
    said = start("--name", "moekit-test-lab", "--work", home / "work").stdout
    return Lab("moekit-test-lab", home / "work", said)


@in_container
@pytest.mark.slow
def test_inside_is_the_caller_and_no_network(lab):
    processes = run(DOCKER, "top", lab.name, "-eo", "pid,uid,gid,args").stdout.splitlines()
    (server,) = [line.split() for line in processes if "jupyter-lab" in line]
    assert server[1:3] == [str(UID), str(GID)]
    code = (
        "import socket\ntry: socket.create_connection(('1.1.1.1', 53), 3)\nexcept OSError: print('offline')"
    )
    assert lab.python(code) == "offline\n"


@in_container
@pytest.mark.slow
def test_every_declared_package_imports(lab):
    packages = set(declared())
    said = lab.python((ROOT / "tests" / "docker" / "imports.py").read_text(), "moekit", *sorted(packages))
    assert {line.split()[0] for line in said.splitlines()} == packages | {"moekit"}


@in_container
@pytest.mark.slow
def test_moekit_is_there_whole(lab):
    code = """
import pathlib, moekit
root = pathlib.Path(moekit.__file__).parent
print(*(path.relative_to(root.parent) for path in root.rglob("*") if path.is_file()), sep=chr(10))
"""
    installed = {name for name in lab.python(code).splitlines() if not name.endswith(".pyc")}
    tracked = run("git", "ls-files", "moekit", cwd=ROOT).stdout.splitlines()
    assert {name for name in tracked if (ROOT / name).exists()} - installed == set()


@in_container
@pytest.mark.slow
def test_a_python_extension_compiles_as_triton_does_it(lab):
    code = """
import pathlib, subprocess, sysconfig, tempfile, importlib.util
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "made.c").write_text('''#include <Python.h>
static struct PyModuleDef made = {PyModuleDef_HEAD_INIT, "made", 0, -1, 0};
PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&made); }''')
include = sysconfig.get_paths()["include"]
subprocess.run(["gcc", "-O3", "-shared", "-fPIC", f"-I{include}", "made.c", "-o", "made.so"], cwd=folder, check=True)
spec = importlib.util.spec_from_file_location("made", folder / "made.so")
print(importlib.util.module_from_spec(spec).__name__)
"""
    assert lab.python(code) == "made\n"


@in_container
@pytest.mark.slow
def test_it_answers_only_with_the_token(lab):
    assert lab.get("/api/contents")[0] == 403
    assert lab.get("/api/contents", token="0" * 48)[0] == 403
    status, body = lab.get("/api/contents/notebooks", token=lab.token)
    assert status == 200
    names = {entry["name"] for entry in json.loads(body)["content"]}
    assert names == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert (lab.work / ".jupyter" / "token").stat().st_mode & 0o077 == 0
    assert lab.token not in run("ps", "-eo", "args").stdout


@in_container
@pytest.mark.slow
def test_an_empty_token_file_starts_nothing():
    done = run(
        *(DOCKER, "run", "--rm", "--env", "JUPYTER_TOKEN_FILE=/dev/null", IMAGE, "jupyter", "lab"),
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "JUPYTER_TOKEN_FILE=/dev/null holds no token" in done.stderr


@in_container
@pytest.mark.slow
def test_the_health_check_turns_healthy(lab):
    template = "{{.State.Health.Status}}"
    for _ in range(60):
        status = run(DOCKER, "inspect", "--format", template, lab.name).stdout.strip()
        if status != "starting":
            break
        time.sleep(0.5)
    assert status == "healthy"


@in_container
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "made"),
    [
        ("README", {}, []),
        ("prepare_data", {"data_dir": "out/data"}, ["out/data"]),
        ("load_shards", {"world_size": 3}, ["out/load_shards/shares.csv"]),
        ("run_inference", {"world_size": 4, "max_batches": 10}, ["out/run_inference/results.json"]),
        ("inspect_routing", {"max_tokens": 1500}, ["out/inspect_routing"]),
    ],
)
def test_a_notebook_runs_headless(start, home, name, parameters, made):
    options = [part for key, value in parameters.items() for part in ("-p", key, str(value))]
    start(
        *("--work", home / "headless", "--", "papermill", "--no-progress-bar"),
        *(f"notebooks/{name}.ipynb", f"/work/{name}.ipynb", *options),
    )
    cells = nbformat.read(home / "headless" / f"{name}.ipynb", as_version=4).cells
    assert [c for c in cells if c.cell_type == "code" and c.execution_count is None] == []
    for path in made:
        assert (home / "headless" / path).exists()


@in_container
@pytest.mark.slow
def test_a_new_user_opens_the_url_and_runs_a_notebook(lab, browser, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(f"{lab.address}/?token={lab.token}")
    start_here = page.locator(".jp-NotebookPanel").first
    start_here.get_by_role("heading", name="Start here").wait_for()
    page.locator(".jp-StatusBar-Widget").get_by_text("Mem:").first.wait_for()
    page.screenshot(path=tmp_path / "start.png")
    start_here.get_by_role("link", name="run_inference").click()
    notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    notebook.get_by_role("heading", name="Run inference").wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = notebook.locator(".jp-CodeCell").last.locator(".jp-InputPrompt")
    # A number in place of the star: the cell has ended.
    expect(last).to_have_text(re.compile(r"\[\d+\]:"), timeout=180_000)
    assert notebook.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert notebook.locator(".jupyter-widgets").first.is_visible()
    page.screenshot(path=tmp_path / "ran.png")
    page.close()
    assert (lab.work / "notebooks" / "out" / "run_inference" / "results.json").exists()


@in_container
@pytest.mark.slow
def test_files_are_the_callers_and_stop_loses_none(lab, start):
    """The kernel has a file open and another is busy when the container is stopped."""
    code = """
import sys
from jupyter_client import BlockingKernelClient
client = BlockingKernelClient(connection_file=f"/tmp/jupyter/kernel-{sys.argv[1]}.json")
client.load_connection_file()
client.start_channels()
client.wait_for_ready(timeout=60)
client.execute(sys.argv[2])
if sys.argv[3] == "wait":
    assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
"""
    for cell, wait in (
        ("kept = open('/work/open.txt', 'w'); kept.write('all of it')", "wait"),
        ("open('/work/busy.txt', 'w').write('busy')\nwhile True: pass", "go on"),
    ):
        status, body = lab.get("/api/kernels", lab.token, b"{}", "POST")
        assert status == 201
        lab.python(code, json.loads(body)["id"], cell, wait)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("mine")])
    saved = json.dumps({"type": "notebook", "content": notebook}).encode()
    assert lab.get("/api/contents/notebooks/load_shards.ipynb", lab.token, saved, "PUT")[0] == 200

    run(DOCKER, "stop", "--time", "5", lab.name)
    # 137: it was killed.
    assert run(DOCKER, "inspect", "--format", "{{.State.ExitCode}}", lab.name).stdout.strip() != "137"
    assert (lab.work / "open.txt").read_text() == "all of it"
    strangers = [path for path in lab.work.rglob("*") if path.lstat().st_uid != lab.work.stat().st_uid]
    assert strangers == []
    assert (lab.work / "open.txt").stat().st_uid in (UID, os.getuid())

    # After a second start all is as it was left.
    said = start("--name", lab.name, "--work", lab.work).stdout
    assert Lab(lab.name, lab.work, said).token == lab.token
    assert nbformat.read(lab.work / "notebooks" / "load_shards.ipynb", as_version=4).cells[0].source == "mine"


# ------------------------------------------------------------------------------------------ the commands of its README


def commands() -> tuple[list[str], list[str]]:
    """The command lines of the README: those that run here, and those that its text says need something else."""
    here, elsewhere = [], []
    for needs, block in re.findall(r"(<!-- needs: [^>]+ -->\n)?```bash\n(.*?)```", README.read_text(), re.S):
        lines = re.sub(r"(\\|\|)\n\s*", r"\1 ", block).strip().splitlines()
        (elsewhere if needs else here).extend(lines)
    return here, elsewhere


def test_the_readmes_commands_are_known():
    here, elsewhere = commands()
    assert "docker/run.sh" in here
    assert "docker/check_gpu.sh" in elsewhere
    assert len(here) >= 20
    for line in here + elsewhere:
        run("bash", "-n", "-c", line)
        for script in re.findall(r"(?<![\w/])docker/\w+\.sh", line):
            assert (ROOT / script).stat().st_mode & 0o100, script


@in_container
@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="installs packages")
def test_the_readmes_commands_run(tmp_path):
    """In their order, in one shell a line, as root with a home of its own; /data is a folder for the time."""
    here, _ = commands()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    compose = (
        "docker-compose" if run(DOCKER, "compose", "version", check=False).returncode else f"{DOCKER} compose"
    )
    (bin_ / "docker").write_text(
        f"""#!/bin/sh
docker={shutil.which(DOCKER)}
case $1 in
compose) shift && exec {compose} "$@" ;;
run) shift && exec $docker run --env OMP_WAIT_POLICY "$@" ;; # how threads wait (see Makefile)
*) exec $docker "$@" ;;
esac
"""
    )
    for path in bin_.iterdir():
        path.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    for folder in (tmp_path, home, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    environment = os.environ | {"HOME": str(home), "PATH": f"{bin_}:{os.environ['PATH']}"}
    environment.pop("DOCKER", None)
    options = os.environ.get("MOEKIT_BUILD_OPTIONS", "")
    made_data = not Path("/data").exists()
    Path("/data").mkdir(exist_ok=True)
    # The page's last commands remove the image.
    run(DOCKER, "tag", IMAGE, "moekit:tested")
    try:
        for line in here:
            line = line.replace("docker/build.sh", f"docker/build.sh {options}")
            for _ in range(40):
                done = run("bash", "-c", line, check=False, timeout=600, cwd=ROOT, env=environment)
                if done.returncode == 0 or not line.startswith("cat "):
                    break
                # A file that a container is about to write.
                time.sleep(0.5)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            if "JupyterLab: " in done.stdout:
                url = re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", done.stdout)[0]
                with urllib.request.urlopen(url, timeout=20) as answer:
                    assert answer.status == 200
        assert (home / "moekit" / "out.ipynb").exists()
    finally:
        run(DOCKER, "rm", "--force", "moekit", "study", "docker_cpu_1", "docker-cpu-1", check=False)
        for folder in ("work", "data"):
            shutil.rmtree(ROOT / "docker" / folder, ignore_errors=True)
        run(DOCKER, "tag", "moekit:tested", IMAGE)
        run(DOCKER, "image", "rm", "moekit:tested")
        if made_data:
            Path("/data").rmdir()


@pytest.mark.parametrize(
    ("script", "settings", "said"),
    [
        ("slurm.sbatch", {}, "this is no Slurm job; start it with sbatch"),
        ("eval_lm.sbatch", {}, "this is no Slurm job; start it with sbatch"),
        (
            "slurm.sbatch",
            {"SLURM_JOB_NODELIST": "n0", "MOEKIT_VENV": "/nowhere"},
            "there is no papermill in /nowhere/bin",
        ),
        (
            "slurm.sbatch",
            {"SLURM_JOB_NODELIST": "n0", "MOEKIT_NOTEBOOK": "none.ipynb"},
            "there is no notebook none.ipynb",
        ),
    ],
)
def test_a_job_of_slurm_says_at_once_what_is_missing(script, settings, said, tmp_path):
    """In one sentence, and not after Ray's nodes have started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "papermill").touch(0o755)
    found = subprocess.run(
        ["/bin/bash", ROOT / "docker" / "cluster" / script],
        env={"PATH": "/usr/bin:/bin", "MOEKIT_VENV": str(tmp_path)} | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1 and found.stderr.startswith(f"{script}: {said}")
    assert found.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["bin"]
