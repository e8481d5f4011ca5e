"""Who the workers are: what TF_CONFIG and SLURM's variables may hold, and what they must not."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfdp.parallel.cluster import Cluster
from tfdp.parallel.cluster_spec import parse_slurm, parse_tf_config
from tfdp.system.exits import ConfigError

GOOD = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


def tf_config(workers: object, kind: object = "worker", index: object = 0) -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": kind, "index": index}})


def assert_one_line(message: str) -> None:
    assert message.isprintable() and len(message) <= 400, message


def test_a_worker_finds_its_place() -> None:
    assert parse_tf_config(json.dumps(GOOD)) == Cluster(("a:1", "b:2"), 1)


def test_a_chief_comes_before_the_workers() -> None:
    jobs = {"chief": ["c:1"], "worker": ["a:1", "b:2"]}
    found = [
        parse_tf_config(json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}})).index
        for kind, index in (("chief", 0), ("worker", 0), ("worker", 1))
    ]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG ({) must be JSON like"),
        ("[]", "TF_CONFIG ([]) must be JSON like"),
        ('{"cluster": {"worker": ["a:1"]}}', "must be JSON like"),
        (json.dumps({**GOOD, "task": {"type": "worker", "index": 2}}), "TF_CONFIG (task.index 2) must lie in 0..1"),
        (json.dumps({**GOOD, "task": {"type": "worker", "index": -1}}), "TF_CONFIG (task.index -1) must lie in 0..1"),
        (json.dumps({**GOOD, "task": {"type": "ps", "index": 0}}), "TF_CONFIG (task.type ps) must be one of the jobs"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "b"]}}), "TF_CONFIG (b) must be host:port"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "b:0"]}}), "TF_CONFIG (b:0) must be host:port"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "a:1"]}}), "TF_CONFIG (a:1) must name each address once"),
        (tf_config(["a:1", "b:²"]), "TF_CONFIG (b:²) must be host:port"),
        (tf_config(["a:1", "b:" + "1" * 400]), "must be host:port with a port from 1 to 65535"),
        (tf_config(["a:1", 7]), "TF_CONFIG (7) must be host:port"),
        (tf_config(["a:1", ["b:2"]]), "TF_CONFIG (a list) must be host:port"),
        (tf_config("a:1"), "TF_CONFIG (cluster.worker) must be a list of one or more host:port"),
        (tf_config([]), "TF_CONFIG (cluster.worker) must be a list of one or more host:port"),
        (tf_config(["a:1", "A:1"]), "TF_CONFIG (a:1) must name each address once"),
        (
            tf_config([f"n{index}:1" for index in range(1_000_000)]),
            "TF_CONFIG (1000000 workers) must name at most 10000",
        ),
        (tf_config(["a:1"], kind=["worker"]), "TF_CONFIG (task.type a list) must be one of the jobs of the cluster"),
        (tf_config(["a:1"], kind=None), "TF_CONFIG (task.type null) must be one of the jobs of the cluster"),
        (tf_config(["a:1", "b:1"], index=True), "TF_CONFIG (task.index true) must be a whole number"),
        (tf_config(["a:1", "b:1"], index=1.0), "TF_CONFIG (task.index 1.0) must be a whole number"),
        (tf_config(["a:1", "b:1"], index="²"), "TF_CONFIG (task.index ²) must be a whole number"),
        (tf_config(["a:1", "b:1"], index=10**400), "TF_CONFIG (task.index a number of about 401 digits) must lie in"),
        (tf_config(["a:1"]).replace("0", "[" * 2000 + "]" * 2000), "must be JSON like"),
        (tf_config(["a:1"]).replace("0", "[" * 900 + "]" * 900), "must be"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0, "index": 1}}',
            "(index) must not be a",
        ),
        (
            '{"cluster": {"worker": ["a:1"], "worker": ["b:1"]}, "task": {}}',
            "TF_CONFIG (worker) must not be a key twice",
        ),
        (json.dumps({"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 1}}), "(cluster.chief)"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "\\ud800\\n"}}',
            "must be a whole number",
        ),
        ("\udcff", "TF_CONFIG (\\xff) must be JSON like"),
        (json.dumps({**GOOD, "cluster": {**GOOD["cluster"], "ps": ["p:1"]}}), "TF_CONFIG (ps) must name the jobs"),  # type: ignore[dict-item]
    ],
)
def test_a_wrong_tf_config_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tf_config(text)
    assert message in str(caught.value)
    assert_one_line(str(caught.value))


@pytest.mark.parametrize(
    "address", ["[::1]:1", "[fe80::1%eth0]:65535", "10.0.0.1:2222", "a-b.c_d.svc.:1", "x" * 63 + ".y:1"]
)
def test_cluster_spec_that_can_be(address: str) -> None:
    assert parse_tf_config(tf_config([address])).addresses == (address,)


@pytest.mark.parametrize(
    "address",
    [
        *(":1", "::1:2222", "[::g]:1", "[10.0.0.1]:1", "10.0.0.256:1", "1.2.3:1", "a b:1", "a..b:1", "-a:1", "a/b:1"),
        *(
            "x" * 64 + ":1",
            "x." * 127 + "y:1",
            "é:1",
            "a:\uff11",
            "a:+1",
            "a:1 ",
            "a:-1",
            "a:65536",
            "a",
            "",
            "http://a:1",
        ),
    ],
)
def test_cluster_spec_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port") as caught:
        parse_tf_config(tf_config([address]))
    assert_one_line(str(caught.value))


def test_an_index_may_be_text_as_tensorflow_reads_it() -> None:
    assert parse_tf_config(tf_config(["a:1", "b:1"], index="1")).index == 1


def slurm(nodes: str, tasks: str, num_tasks: object, rank: object = 0, **others: str) -> dict[str, str]:
    variables = {"STEP_NODELIST": nodes, "STEP_TASKS_PER_NODE": tasks, "STEP_NUM_TASKS": num_tasks, "PROCID": rank}
    return {f"SLURM_{name}": str(value) for name, value in {**variables, "JOB_ID": "7", **others}.items()}


@pytest.mark.parametrize(
    ("nodes", "tasks", "hosts"),
    [
        ("n[09-11],m5", "1(x4)", ["n09", "n10", "n11", "m5"]),
        ("rack[1-2]n[7,9]-ib", "1(x4)", ["rack1n7-ib", "rack1n9-ib", "rack2n7-ib", "rack2n9-ib"]),
        ("n[9-10]", "2,1", ["n9", "n9", "n10"]),
    ],
)
def test_slurm_lists_hosts(nodes: str, tasks: str, hosts: list[str]) -> None:
    found = parse_slurm(slurm(nodes, tasks, len(hosts), len(hosts) - 1))
    assert [address.partition(":")[0] for address in found.addresses] == hosts
    assert found.index == len(hosts) - 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID (null) must be a whole number from 0 to 1: start the workers by"),
        (slurm("n[1-2]", "1(x2)", "2", "2"), "SLURM_PROCID (2) must be a whole number from 0 to 1"),
        (slurm("n[1-2]", "1(x2)", "2", "²"), "SLURM_PROCID (²) must be"),
        (slurm("n[1-2]", "1(x2)", "two"), "SLURM_STEP_NUM_TASKS (two) must be"),
        (slurm("n[1-2]", "1(x2)", "9" * 400), "SLURM_STEP_NUM_TASKS (9999"),
        (slurm("", "1(x2)", "2"), "SLURM_STEP_NODELIST () must list"),
        (slurm("n[1-", "1(x2)", "2"), "SLURM_STEP_NODELIST (n[1-) must list"),
        (slurm("n[2-1]", "1(x2)", "2"), "SLURM_STEP_NODELIST (n[2-1]) must list"),
        (slurm("n[1-999999999]", "1(x2)", "2"), "SLURM_STEP_NODELIST (n[1-999999999]) must list at most"),
        (slurm("n[1-9999][1-9999]", "1(x2)", "2"), "SLURM_STEP_NODELIST (n[1-9999][1-9999]) must list at most"),
        (slurm("n[1-2]", "1(x999999999)", "2"), "SLURM_STEP_TASKS_PER_NODE (1(x999999999)) must list"),
        (slurm("n[1-2]", "1(x3)", "2"), "SLURM_STEP_TASKS_PER_NODE (1(x3)) must give each of the 2 nodes its tasks"),
        (slurm("n[1-2]", "1(x2)", "3"), "must give each of the 2 nodes its tasks, 3 in all"),
        (slurm("n[1-2]", "one", "2"), "SLURM_STEP_TASKS_PER_NODE (one) must list"),
        (slurm("n1,n1", "1(x2)", "2"), "SLURM_STEP_NODELIST (n1:20007) must name each address once"),
        (slurm("n 1,n2", "1(x2)", "2"), "SLURM_STEP_NODELIST (n 1:20007) must be host:port"),
        (slurm("n[1-2]", "1(x2)", "2", JOB_ID="x"), "SLURM_JOB_ID (x) must be"),
    ],
)
def test_wrong_variables_of_slurm_are_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_slurm(variables)
    assert message in str(caught.value)
    assert_one_line(str(caught.value))


# --- Whatever there may be ---------------------------------------------------------------------------

ADDRESSES = st.one_of(
    st.from_regex(r"[a-z0-9.\-\[\]:]{1,20}:[0-9²]{1,6}", fullmatch=True),
    st.text(max_size=300),
    st.ip_addresses().map(str),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=500), st.just(10**400), ADDRESSES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
JOBS = st.dictionaries(st.sampled_from(["chief", "worker", "ps", "²"]), st.lists(ADDRESSES, max_size=4) | VALUES)
TASKS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["chief", "worker"]) | VALUES, "index": st.integers(-1, 4) | VALUES}
)
TF_CONFIGS = st.one_of(
    st.text(),
    VALUES.map(json.dumps),
    st.builds(lambda jobs, task: json.dumps({"cluster": jobs, "task": task}), JOBS | VALUES, TASKS | VALUES),
    st.integers(0, 3000).map(lambda depth: tf_config(["a:1"]).replace("0", "[" * depth + "]" * depth)),
    st.integers(0, 100).map(lambda cut: json.dumps(GOOD)[:cut] + json.dumps(GOOD)[cut + 1 :]),
)
NOTATION = st.text(alphabet="n1290[]-,()x²é \n", max_size=40) | st.sampled_from(["n[1-2]", "1(x2)", "2", "1", "0"])
SLURMS = st.dictionaries(
    st.sampled_from([f"SLURM_{name}" for name in ("STEP_NUM_TASKS", "PROCID", "JOB_ID")]),
    st.sampled_from(["2", "1", "0"]) | NOTATION,
).flatmap(
    lambda found: st.fixed_dictionaries(
        {}, optional={"SLURM_STEP_NODELIST": NOTATION, "SLURM_STEP_TASKS_PER_NODE": NOTATION}
    ).map(lambda lists: {**found, **lists})
)


def check(parse, value: object) -> None:
    """Reads it within two seconds, or refuses it in one line; nothing else may come of it."""
    started = time.monotonic()
    try:
        found = parse(value)
    except ConfigError as error:
        assert_one_line(str(error))
    else:
        assert isinstance(found, Cluster) and 0 <= found.index < found.num_workers
    assert time.monotonic() - started < 2


def fuzzed(num_examples: int):
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@given(TF_CONFIGS)
@fuzzed(100)
def test_no_tf_config_ends_in_anything_but_one_line(text: str) -> None:
    check(parse_tf_config, text)


@given(SLURMS)
@fuzzed(100)
def test_no_variables_of_slurm_end_in_anything_but_one_line(variables: dict[str, str]) -> None:
    check(parse_slurm, variables)


@pytest.mark.slow
@given(TF_CONFIGS)
@fuzzed(1000)
def test_a_thousand_tf_configs(text: str) -> None:
    check(parse_tf_config, text)


@pytest.mark.slow
@given(SLURMS)
@fuzzed(1000)
def test_a_thousand_sets_of_slurms_variables(variables: dict[str, str]) -> None:
    check(parse_slurm, variables)
