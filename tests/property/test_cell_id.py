"""What the id of a cell depends on, and what it does not."""

import random
import re
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moebench.config import cell_id, resolve, to_plain
from moebench.optimizer_config import DECAY_KEYS, MUON_KEYS
from moebench.schema import COMPONENTS

CHANGES: dict[str, tuple[Any, ...]] = {
    "seed": (1, 2),
    "allow_noncausal": (True,),
    "task.sequence_length": (32, 256),
    "task.eval_windows": (4, None),
    "task.train_windows": (50,),
    "task.data.max_bytes": (1000,),
    "task.data.tokenizer": ("other",),
    "task.data.held_out_domains": (["b"], ["a", "b"]),
    "model.d_model": (96,),
    "model.num_layers": (3,),
    "model.num_heads": (8,),
    "model.ffn_width": (256,),
    "model.activation": ("swiglu",),
    "model.rope_theta": (500.0,),
    "model.num_kv_heads": (1, 2),
    "model.attention_bias": ("qkv", "all"),
    "model.ffn_bias": (True,),
    "model.norm": ("layernorm",),
    "model.norm_eps": (1e-5,),
    "model.qk_norm": ("head", "full"),
    "model.tie_embeddings": (True,),
    "model.embedding_scale": (1.0, 2.0),
    "model.residual_scale": (0.5,),
    "model.attention_dropout": (0.1,),
    "model.residual_dropout": (0.1,),
    "model.embedding_dropout": (0.1,),
    "model.rope_scaling": ("linear", "ntk"),
    "model.rope_low_frequency": (2.0,),
    "model.rope_high_frequency": (8.0,),
    "layout.num_experts": (4,),
    "layout.experts_in": ("encoder", "decoder"),
    "layout.expert_width": (64,),
    "layout.expert_activation": ("swiglu",),
    "layout.match": ("none",),
    "layout.total_params": (2.0,),
    "layout.depth": (2,),
    "layout.capacity_factor_train": (1.25,),
    "layout.capacity_factor_eval": (2.0,),
    "layout.capacity_rule": ("vmoe", "switch"),
    "layout.overflow": ("reroute", "pass"),
    "layout.expert_dropout": (0.1, 0.2),
    "layout.drop_order": ("position",),
    "layout.n": (2,),
    "router.jitter": (0.0,),
    "router.exploration": ("sample",),
    "router.dropout": (0.2,),
    "router.losses.z": (0.001,),
    "router.losses.load_balance": (0.1,),
    "train.steps": (10,),
    "train.skip_batches": (5,),
    "train.batch_size": (4,),
    "train.learning_rate": (1e-3,),
    "train.warmup_steps": (0,),
    "train.final_rate": (0.1,),
    "train.weight_decay": (0.0,),
    "train.beta1": (0.8,),
    "train.beta2": (0.99,),
    "train.clip_norm": (2.0,),
    "train.z_loss": (1e-4,),
    "train.optimizer": ("muon",),
    "train.router_learning_rate": (0.0, 1e-3),
    "train.expert_learning_rate": (1e-3,),
    "train.embedding_learning_rate": (1e-3,),
    "train.head_learning_rate": (1e-3,),
    "train.weight_decay_groups": (["hidden"], []),
    "train.schedule": ("wsd", "constant"),
    "train.precision": ("bf16",),
    "train.threads": (2,),
    "train.accumulate": (2,),
    "train.cross_entropy": ("chunked",),
    "train.trainable": ("experts",),
    "train.tf32": (True,),
    "balance.scope": ("local",),
    "parallel.data": (2,),
    "parallel.expert": (2,),
    "parallel.scope": ("local",),
}
NO_CHANGES: dict[str, tuple[Any, ...]] = {
    "train.log_every": (1, 50),
    "train.eval_every": (7,),
    "train.checkpoint_every": (7,),
    "train.keep_checkpoints": (["5%"], [7]),
    "train.device": ("cpu", "cuda"),
    "train.max_epochs": (2.0,),
    "train.recompute": ("blocks",),
    "parallel.devices": (None,),
    "parallel.nodes": (1,),
    "parallel.timeout_s": (7.0,),
    "parallel.stall_timeout_s": (7.0,),
    "parallel.check_every": (7,),
    "parallel.overlap": (False,),
    "parallel.shard_optimizer": (True,),
    "parallel.async_checkpoints": (True,),
    "task.data.path": ("/somewhere/else.txt",),
    "layout.recompute": (True,),
}


def nest_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def shuffle(tree: Any, order: random.Random) -> Any:
    """Return the same mapping with its keys in another order."""
    if not isinstance(tree, dict):
        return tree
    keys = list(tree)
    order.shuffle(keys)
    return {key: shuffle(tree[key], order) for key in keys}


def identity(raw: Mapping[str, Any]) -> str:
    return cell_id(resolve(raw), "data")


def choices_of(table: Mapping[str, tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw some of the keys with one of their values each."""
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in table.items()})


@given(choices_of(CHANGES), choices_of(NO_CHANGES), st.randoms(use_true_random=False))
def test_cell_id_ignores_order_and_cadence(chosen, cadence, order) -> None:
    assert identity(nest_keys(chosen)) == identity(shuffle(nest_keys({**chosen, **cadence}), order))
    assert re.fullmatch(r"[0-9a-f]{12}", identity(nest_keys(chosen)))


def test_cell_id_ignores_on_which_machines_its_processes_are() -> None:
    spread = {"data": 4, "devices": 2, "nodes": 2}
    assert identity({"parallel": spread}) == identity({"parallel": {"data": 4}})


def test_cell_id_ignores_how_a_file_is_made() -> None:
    data = {"path": "a.parquet", "made_by": "a command"}
    assert identity({"task": {"data": data}}) == identity({"task": {"data": {"path": "b.parquet"}}})


@given(choices_of(CHANGES), st.sampled_from(sorted(CHANGES)))
def test_cell_id_follows_every_other_key(chosen, key) -> None:
    without = {name: value for name, value in chosen.items() if name != key}
    for value in CHANGES[key]:
        assert identity(nest_keys(without)) != identity(nest_keys({**without, key: value}))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted keys of a nested mapping."""
    keys = set()
    for key, value in tree.items():
        inner = isinstance(value, dict) and value and key != "losses"
        keys |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}"}
    return keys


def test_the_tables_above_leave_no_key_out() -> None:
    # What joins the configuration later must be put on one side or the other.
    named = {f"{kind}.name" for kind in COMPONENTS}
    source = {f"task.data.{key}" for key in component_data_fields() if f"task.data.{key}" not in NO_CHANGES}
    covered = {*CHANGES, *NO_CHANGES, *named, *source, "router.losses", "train.eval_every"}
    covered |= {"model.rope_factor", "model.rope_original_length"}  # only with a scaling of positions
    covered |= {f"train.{key}" for key in (*MUON_KEYS, *DECAY_KEYS)}  # only with Muon, only with wsd
    covered |= {"train.compile"}  # not with tf32
    covered |= {"train.mup_base_width"}  # not with every number of heads, see test_mup.py
    keys = leaves(to_plain(resolve({})))
    covered |= {key for key in keys if key.startswith("init.")}  # see test_init_config.py, test_combined_parents.py
    covered |= {"train.spike_policy", "train.spike_window", "train.spike_threshold"}  # see test_spikes.py
    assert keys <= covered


def test_cell_id_follows_the_options_of_a_scaling_of_positions() -> None:
    model = {"rope_scaling": "llama3", "rope_original_length": 32}
    cells = [model, model | {"rope_original_length": 64}, model | {"rope_factor": 2.0}]
    assert len({identity({"model": cell}) for cell in cells}) == 3


def test_cell_id_follows_options_of_the_optimizer_where_they_have_an_effect() -> None:
    given = {"muon_momentum": 0.9, "decay_fraction": 0.1}
    assert identity({"train": given}) == identity({})
    for chosen in ({"optimizer": "muon"}, {"schedule": "wsd"}):
        assert identity({"train": chosen | given}) != identity({"train": chosen})
    assert identity({"train": {"mup_base_width": 32}}) != identity({})
    assert identity({"train": {"compile": True}}) != identity({})


def component_data_fields() -> list[str]:
    return list(to_plain(resolve({}))["task"]["data"])


def test_cell_id_follows_data_plugins_and_names() -> None:
    config = resolve({})
    assert cell_id(config, "a") != cell_id(config, "b")
    assert cell_id(config, "a") != cell_id(config, "a", ["p"])
    assert cell_id(config, "a", ["p", "q"]) == cell_id(config, "a", ["q", "p"])
    assert identity({"router": "hash"}) != identity({"router": "random"})
