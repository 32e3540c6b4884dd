"""What every code means: what will happen, why, a config that triggers it and one that does not, whose word it is.

The tests check each pair of configs: the bad one gives its code and nothing else, the good one nothing at all.
"""

from __future__ import annotations

import json

from ttt.config.explanation import Explanation

_MOSHI = "backbone: {name: moshi}\n"
_LM = "TTT-LM (arXiv 2407.04620)"
_VIDEO = "TTT-Video (arXiv 2504.05298)"
_YAML = "YAML 1.2.2"
_READER = "`ttt.config.source`"
_SCHEMA = "`ttt schema`"
_ESTIMATE = "`ttt.costs`, held against measurements in the tests"
_ADAMW = "AdamW (arXiv 1711.05101): a step moves a parameter by about its learning rate"
_PLUGINS = "`ttt.plugins`"


_START = "ttt: {layers: [1]}\ntrain: {init_from: first.safetensors}\n"


def _lines(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


_TWO = {
    "two.jsonl": _lines('{"path": "a.wav", "duration": 61.2}', '{"path": "b.wav", "duration": 45.0}'),
    "eval.jsonl": _lines('{"path": "a.wav", "duration": 61.2}'),
    "a.wav": "sound\n",
    "a.json": '{"alignments": []}\n',
    "b.wav": "sound\n",
    "b.json": '{"alignments": []}\n',
}
_GOOD_DATA = _MOSHI + "data: {train_data: two.jsonl, eval_data: eval.jsonl}\n"


def _data(name: str, *lines: str) -> dict[str, str]:
    return {**_TWO, name: _lines(*lines)}


def _adapter() -> str:
    """An adapter file of the Moshi demo's layer 1, without its tensors: what a check reads of it."""
    moshi = {"name": "moshi", "preset": "demo", "random_weights": False, "dim": None, "num_heads": None}
    loss = {"num_layers": None, "text_padding_weight": 0.5, "first_codebook_weight_multiplier": 100.0}
    ttt = {"layer_type": "mlp", "qkvo_bias": True, "normalize_qk": True, "normalize_target": True}
    settings = {
        "version": 1,
        "ttt_version": "0.1.0",
        "backbone": {**moshi, **loss},
        "backbone_weights": None,
        "backbone_trained": None,
        "ttt": {**ttt, "learnable_token_idx": False, "input_norm": "rms"},
        "sites": [{"layer": 1, "name": "transformer.layers.1.ttt", "dim": 128, "num_heads": 4}],
        "training": {},
    }
    header = json.dumps({"__metadata__": {"format": "ttt-adapter", "adapter_config": json.dumps(settings)}})
    header += " " * (-len(header) % 256)  # a length whose bytes are letters of ASCII, so that the file is a text
    return len(header).to_bytes(8, "little").decode("ascii") + header


EXPLANATIONS: dict[str, Explanation] = {
    "TTT001": Explanation(
        "error",
        "The file is not YAML: a quote or bracket is open, a tab indents, a colon stands where none may.",
        "Nothing after that place can be read, so nothing else is checked.",
        _MOSHI + "train: {lr: 1e-4\n",
        _MOSHI + "train: {lr: 1e-4}\n",
        _YAML,
    ),
    "TTT002": Explanation(
        "error",
        "A key stands twice in one section.",
        "Most readers of YAML take the last one without a word, so the run would not be what its author reads.",
        _MOSHI + "train:\n  lr: 1e-4\n  lr: 1e-5\n",
        _MOSHI + "train:\n  lr: 1e-5\n",
        _YAML + ", section 3.2.1.3: keys are unique",
    ),
    "TTT003": Explanation(
        "error",
        "The file holds nothing, or comments alone.",
        "There is no run to check; a wrong file was named, or an editor has not saved yet.",
        "# to be written\n",
        _MOSHI,
        _READER,
    ),
    "TTT004": Explanation(
        "error",
        "The file is a list or a text, not sections of `key: value`.",
        "A missing space after a colon turns a whole file into text.",
        "- backbone\n",
        _MOSHI,
        _READER,
    ),
    "TTT005": Explanation(
        "error",
        "The file is larger than 1 MiB.",
        "No config is; weights or data were named by mistake, or the file is meant to exhaust memory.",
        "# a comment of 2 MiB\n" + _MOSHI,
        "# a short comment\n" + _MOSHI,
        _READER,
        bad_bytes=b"#" * (2 << 20) + b"\n" + _MOSHI.encode(),
    ),
    "TTT006": Explanation(
        "error",
        "Values are nested more than 32 levels deep.",
        "A config has two or three levels; deep nesting exhausts the stack of whatever reads it.",
        "run_dir: " + "[" * 33 + "]" * 33 + "\n",
        _MOSHI,
        _READER,
    ),
    "TTT007": Explanation(
        "error",
        "The file holds more than 10,000 values once its aliases are expanded.",
        "A few lines of aliases of aliases can stand for billions of values.",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n",
        _MOSHI,
        _READER,
    ),
    "TTT008": Explanation(
        "error",
        "The file is in another encoding than UTF-8.",
        "Paths with letters beyond ASCII would name other files.",
        "# saved as Latin-1: Müller\n" + _MOSHI,
        "# saved as UTF-8: Müller\n" + _MOSHI,
        _YAML + ", section 5.2",
        bad_bytes="# Müller\n".encode("latin-1") + _MOSHI.encode(),
    ),
    "TTT009": Explanation(
        "error",
        "The file holds a NUL or another character that is not text.",
        "It is a binary file, or a broken copy.",
        "# a NUL follows: ␀\n" + _MOSHI,
        "# text\n" + _MOSHI,
        _YAML + ", section 5.1",
        bad_bytes=b"# \0\n" + _MOSHI.encode(),
    ),
    "TTT010": Explanation(
        "error",
        "A value carries a YAML tag.",
        "Tags ask readers to make objects, which is how a config runs code; nothing in a config is run here.",
        _MOSHI + "run_dir: !!python/name:os.system x\n",
        _MOSHI + "run_dir: x\n",
        _YAML + ", section 3.2.1.2",
    ),
    "TTT011": Explanation(
        "error",
        "A key is no word: a list, a mapping, an alias, or the `<<` of old YAML.",
        "No section has such a key, and `<<` is a plain key in YAML 1.2, so it would merge nothing.",
        _MOSHI + "train: {[lr]: 1e-4}\n",
        _MOSHI + "train: {lr: 1e-4}\n",
        _YAML,
    ),
    "TTT012": Explanation(
        "error",
        "A second document begins after `---`.",
        "One of the two would be left out without a word.",
        _MOSHI + "---\n" + _MOSHI,
        "---\n" + _MOSHI,
        _YAML + ", chapter 9",
    ),
    "TTT013": Explanation(
        "error",
        "An alias has no anchor before it, or stands inside what its anchor names.",
        "The first means nothing; the second never ends.",
        _MOSHI + "train: {lr: *rate}\n",
        _MOSHI + "train: {lr: &rate 1e-4, weight_decay: *rate}\n",
        _YAML + ", section 7.1",
    ),
    "TTT101": Explanation(
        "error",
        "No section has a key of that name.",
        "A misspelt key that is read by nobody leaves the default in force, and the run trains something else.",
        _MOSHI + "ttt: {mini_bach_size: 8}\n",
        _MOSHI + "ttt: {mini_batch_size: 8}\n",
        _SCHEMA,
    ),
    "TTT102": Explanation(
        "error",
        "A value is of another type than its key takes.",
        "Types are not guessed: `'16'` is text, `yes` is text, `1e-5` is a number.",
        _MOSHI + "train: {max_steps: many}\n",
        _MOSHI + "train: {max_steps: 1000}\n",
        _SCHEMA,
    ),
    "TTT103": Explanation(
        "error",
        "A value is of the right type, but outside what its key allows.",
        "The run would fail later, or divide by zero.",
        _MOSHI + "ttt: {mini_batch_size: 0}\n",
        _MOSHI + "ttt: {mini_batch_size: 1}\n",
        _SCHEMA,
    ),
    "TTT104": Explanation(
        "error",
        "A key that has no default is missing.",
        "A config names at least its backbone.",
        "train: {max_steps: 1000}\n",
        _MOSHI + "train: {max_steps: 1000}\n",
        _SCHEMA,
    ),
    "TTT105": Explanation(
        "error",
        "A key stands in a section that does not have it, and another one does.",
        "Where it stands nobody would read it. `--fix` moves a key that has a line of its own, its comment with it.",
        _MOSHI + "ttt: {lr: 1e-4}\n",
        _MOSHI + "train: {lr: 1e-4}\n",
        _SCHEMA,
    ),
    "TTT106": Explanation(
        "error",
        "Keys contradict one another: each is well by itself, but no layer could honour both.",
        "One of them would have to be ignored, and no option is ever ignored.",
        _MOSHI + "ttt: {layer_type: linear, mlp_layers: 3}\n",
        _MOSHI + "ttt: {layer_type: mlp, mlp_layers: 3}\n",
        "`ttt.config.schema`",
    ),
    "TTT107": Explanation(
        "error",
        "A key is an option of another installed backbone.",
        "A config was copied from one backbone to another; this one would not read it.",
        "backbone: {name: moshi, flavour: sour}  # an option of the backbone `toy`, which is installed, too\n",
        _MOSHI,
        _SCHEMA,
        needs="a second backbone, toy",
    ),
    "TTT108": Explanation(
        "error",
        "An override of `--set` cannot be applied: it is no `section.key=value`, or goes through a plain value.",
        "The run would go on without it.",
        _MOSHI,
        _MOSHI,
        "`ttt check --help`",
        options=("--set", "train.lr"),
        good_options=("--set", "train.lr=1e-4"),
    ),
    "TTT111": Explanation(
        "error",
        "A number in `layers` is none of the backbone's layers.",
        "Layers are counted from 0, so the last of four is 3; a layer that is not there gets no TTT.",
        _MOSHI + "ttt: {layers: [2, 4]}\n",
        _MOSHI + "ttt: {layers: [2, 3]}\n",
        "the backbone's own facts",
    ),
    "TTT112": Explanation(
        "error",
        "The backbone's width does not divide into that many heads.",
        "Every head gets an equal part of the channels.",
        _MOSHI + "ttt: {num_heads: 5}\n",
        _MOSHI + "ttt: {num_heads: 8}\n",
        _LM + ", multi-head TTT",
    ),
    "TTT113": Explanation(
        "error",
        "Heads are of odd width, and rotary embedding turns pairs of channels.",
        "One channel of each head would be left without a partner.",
        _MOSHI + "ttt: {num_heads: 128}\n",
        _MOSHI + "ttt: {num_heads: 128, rope: none}\n",
        "RoFormer (arXiv 2104.09864), equation 15",
    ),
    "TTT114": Explanation(
        "error",
        "The inner MLP's hidden width rounds to zero.",
        "There would be no inner model to learn anything.",
        _MOSHI + "ttt: {mlp_expansion_factor: 0.01}\n",
        _MOSHI + "ttt: {mlp_expansion_factor: 1.0}\n",
        _LM + ": the hidden width is 4 times the head's",
    ),
    "TTT201": Explanation(
        "warning",
        "Every mini-batch is a checkpoint of its own: all carries are kept, and every inner step runs twice.",
        "A scan in groups of g keeps (N/g)·S + g·(S+A) at its peak, for N mini-batches, S bytes of fast weights and A "
        "of activations. Larger groups keep fewer carries for the same time, and 0 runs each step once; the finding "
        "compares them in this config's numbers. Where A is much larger than S, groups of one need the least memory "
        "of all, and the finding is a note. Gradients are the same for every value: wrong ones come from layers that "
        "keep state on themselves, which `ttt check --probe` finds.",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 1, mini_batch_size: 1}\n",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 16, mini_batch_size: 1}\n",
        _VIDEO + " trained with groups of 16; " + _ESTIMATE,
    ),
    "TTT202": Explanation(
        "note",
        "Activation checkpointing surrounds the scan's own groups: every inner step runs forward three times.",
        "The first run, one more because the layer is checkpointed, one more because its group is. Where one layer's "
        "scan fits in memory the inner level saves nothing that the outer one does not.",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\ntrain: {gradient_checkpointing: true}\n",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 0}\ntrain: {gradient_checkpointing: true}\n",
        "counted on the running model in the tests",
    ),
    "TTT203": Explanation(
        "note",
        "The scan recomputes in groups of a size that needs twice the memory of the best one, or more.",
        "N/g carries are kept, and one group runs at a time: the least is near √(N·S/(S+A)), for N mini-batches, S "
        "bytes of fast weights and A of all that a mini-batch keeps and needs while its group runs. Every size takes "
        "about the same time.",
        _MOSHI + "ttt: {mini_batch_size: 1, scan_checkpoint_group_size: 1500}\ndata: {duration_sec: 240}\n",
        _MOSHI + "ttt: {mini_batch_size: 1, scan_checkpoint_group_size: 50}\ndata: {duration_sec: 240}\n",
        "sublinear memory (arXiv 1604.06174); " + _ESTIMATE,
    ),
    "TTT204": Explanation(
        "note",
        "The group is larger than the number of mini-batches, so nothing is split and nothing is recomputed.",
        "Whoever writes it expects less memory. The default, 16, says nothing of the kind and is left alone.",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 64}\n",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\n",
        "`ttt.ops.scan`",
    ),
    "TTT205": Explanation(
        "warning",
        "The scan keeps every activation, and the run will or may not fit; with groups it would.",
        "Recomputing costs one more forward of the inner steps. Running out of memory costs the run.",
        _MOSHI
        + "ttt: {scan_checkpoint_group_size: 0, mini_batch_size: 4}\n"
        + "train: {batch_size: 8}\ndata: {duration_sec: 60}\n",
        _MOSHI
        + "ttt: {scan_checkpoint_group_size: 12, mini_batch_size: 4}\n"
        + "train: {batch_size: 8}\ndata: {duration_sec: 60}\n",
        _ESTIMATE,
        options=("--memory", "2GiB"),
    ),
    "TTT301": Explanation(
        "error",
        "Tokens of a mini-batch learn from those after them, on a backbone that predicts those.",
        "The training loss falls splendidly, because the answer is in the input; streaming, where the future is not "
        "there, gives garbage. With one token in a mini-batch there is nothing to leak.",
        _MOSHI + "ttt: {causal: false, rope: none}\n",
        _MOSHI + "ttt: {causal: false, rope: none, mini_batch_size: 1}\n",
        _LM + ", section 2.4: the causal mask of the dual form",
    ),
    "TTT302": Explanation(
        "error",
        "Fast weights are carried from window to window, but windows are read in random order.",
        "A window would begin with what an unrelated one taught.",
        _MOSHI + "ttt: {persistent_states: true}\ndata: {shuffle: true}\n",
        _MOSHI + "ttt: {persistent_states: true}\ndata: {shuffle: false}\n",
        "`ttt.train.order`",
    ),
    "TTT303": Explanation(
        "warning",
        "A window is shorter than one mini-batch.",
        "The fast weights never move on to a second mini-batch, so what the layer carries is never trained.",
        _MOSHI + "ttt: {mini_batch_size: 256}\n",
        _MOSHI + "ttt: {mini_batch_size: 64}\n",
        _LM + ", section 2.3",
    ),
    "TTT304": Explanation(
        "warning",
        "States are carried through data that is one recording.",
        "They start over where a recording begins. With one, that is once in an epoch, and the layers hardly ever see "
        "a beginning, which is what they start from when they are used.",
        _MOSHI
        + "ttt: {persistent_states: true}\ndata: {train_data: one.jsonl, eval_data: eval.jsonl, shuffle: false}\n",
        _MOSHI
        + "ttt: {persistent_states: true}\ndata: {train_data: two.jsonl, eval_data: eval.jsonl, shuffle: false}\n",
        "`ttt.train.order`",
        files=_data("one.jsonl", '{"path": "a.wav", "duration": 61.2}'),
    ),
    "TTT305": Explanation(
        "warning",
        "States are to be carried from window to window, but every recording is one window.",
        "Each window starts over, so the option does nothing but fix the order.",
        _MOSHI
        + "ttt: {persistent_states: true}\n"
        + "data: {train_data: short.jsonl, eval_data: eval.jsonl, shuffle: false, duration_sec: 15}\n",
        _MOSHI
        + "ttt: {persistent_states: true}\n"
        + "data: {train_data: two.jsonl, eval_data: eval.jsonl, shuffle: false, duration_sec: 15}\n",
        "`ttt.train.order`",
        files=_data("short.jsonl", '{"path": "a.wav", "duration": 15.0}', '{"path": "b.wav", "duration": 15.0}'),
    ),
    "TTT306": Explanation(
        "note",
        "A quarter or more of what carried windows compute is padding.",
        "Where mini-batches do not divide a window, each row goes on inside one: the rest of that one, whole ones, and "
        "the beginning of the last are laid out separately, each as wide as the widest row needs.",
        _MOSHI + "ttt: {persistent_states: true, mini_batch_size: 128}\ndata: {shuffle: false}\n",
        _MOSHI + "ttt: {persistent_states: true, mini_batch_size: 94}\ndata: {shuffle: false}\n",
        "`ttt.ops.minibatch`",
    ),
    "TTT401": Explanation(
        "error",
        "Parameters, moments and what must wait for backward take more memory than the device has.",
        "The run would end with an out-of-memory error, at the first step or, when the optimiser first keeps moments, "
        "the second.",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\ntrain: {batch_size: 16}\n",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\ntrain: {batch_size: 1}\n",
        _ESTIMATE,
        options=("--memory", "192MiB"),
    ),
    "TTT402": Explanation(
        "warning",
        "The device's memory lies inside the range that the run may need.",
        "Kernels, frozen parts and the moment's temporaries decide which end of the range holds.",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\ntrain: {batch_size: 4}\n",
        _MOSHI + "ttt: {scan_checkpoint_group_size: 4}\ntrain: {batch_size: 1}\n",
        _ESTIMATE,
        options=("--memory", "192MiB"),
    ),
    "TTT403": Explanation(
        "error",
        "One checkpoint is larger than what is free on the disk of `run_dir`.",
        "A run of days would fail when it saves, and leave nothing.",
        _MOSHI + "ttt: {mlp_hidden_dims: [1000000000000]}\n",
        _MOSHI + "ttt: {mlp_hidden_dims: [128]}\n",
        _ESTIMATE,
        options=("--memory", "1000000PiB"),
    ),
    "TTT404": Explanation(
        "warning",
        "The checkpoints that the run keeps are together larger than what is free on the disk of `run_dir`.",
        "The first ones are saved and a later one is not; `ckpt_keep` removes old ones as new ones come.",
        _MOSHI + "train: {max_steps: 1000000000000, ckpt_freq: 1, ckpt_keep: null}\n",
        _MOSHI + "train: {max_steps: 1000000000000, ckpt_freq: 1, ckpt_keep: 3}\n",
        _ESTIMATE,
    ),
    "TTT405": Explanation(
        "note",
        "What the run costs: arithmetic, memory by part, disk. `--cost` asks for it; in JSON it is numbers.",
        "A token and head multiplies `6F² + 4CF` with a linear inner model of width F and mini-batches of C, and "
        "`56F² + 20CF` with the MLP of two layers, a multiplication and its addition counted as two; training is three "
        "times that, and once more for every level of recomputation. The projections, `8D²` a token, run again only "
        "inside activation checkpoints.",
        _MOSHI + "ttt: {layers: [1]}\n",
        _MOSHI + "ttt: {layers: [1]}\n",
        "`ttt.costs`, held against PyTorch's FlopCounterMode on the layer, and against measured memory",
        options=("--cost",),
        good_options=(),
    ),
    "TTT501": Explanation(
        "error",
        "A file or folder of data is not there.",
        "Relative paths start at the folder that the command runs in.",
        _MOSHI + "data: {train_data: three.jsonl, eval_data: eval.jsonl}\n",
        _GOOD_DATA,
        "the file system",
        files=_TWO,
    ),
    "TTT502": Explanation(
        "note",
        "The run is evaluated on what it trains on.",
        "Such a loss cannot tell learning from memorising.",
        _MOSHI + "data: {train_data: two.jsonl}\n",
        _GOOD_DATA,
        "`ttt.train.evaluation`",
        files=_TWO,
    ),
    "TTT503": Explanation(
        "warning",
        "The first evaluation would come after the last step.",
        "Only the one at the end is made, which `eval_freq: 0` says without the appearance of more.",
        _MOSHI + "train: {max_steps: 500}\neval: {eval_freq: 1000}\n",
        _MOSHI + "train: {max_steps: 500}\neval: {eval_freq: 100}\n",
        "`ttt.train.loop`",
    ),
    "TTT504": Explanation(
        "error",
        "Lines of the data are no JSON objects; the first few are named.",
        "A run reads all of its data's lines before its first step, and stops there.",
        _MOSHI + "data: {train_data: broken.jsonl, eval_data: eval.jsonl}\n",
        _GOOD_DATA,
        "the backbone's data format",
        files=_data("broken.jsonl", '{"path": "a.wav", "duration": 61.2}', "b.wav 45.0"),
    ),
    "TTT505": Explanation(
        "error",
        "Lines of the data lack a `path`, or a `duration` in seconds.",
        "Neither can be guessed.",
        _MOSHI + "data: {train_data: lacking.jsonl, eval_data: eval.jsonl}\n",
        _GOOD_DATA,
        "the backbone's data format",
        files=_data("lacking.jsonl", '{"path": "a.wav", "duration": 61.2}', '{"path": "b.wav"}'),
    ),
    "TTT506": Explanation(
        "error",
        "Lines of the data name files that are not there.",
        "Paths start at the folder of the `.jsonl` file, wherever the command runs.",
        _MOSHI + "data: {train_data: gone.jsonl, eval_data: eval.jsonl}\n",
        _GOOD_DATA,
        "the backbone's data format",
        files=_data("gone.jsonl", '{"path": "a.wav", "duration": 61.2}', '{"path": "gone.wav", "duration": 45.0}'),
    ),
    "TTT507": Explanation(
        "note",
        "Half of the recordings, or more, are shorter than a window.",
        "A window is computed whole: what the recording lacks is padding, which costs as much as speech.",
        _MOSHI + "data: {train_data: two.jsonl, eval_data: long.jsonl, duration_sec: 60}\n",
        _MOSHI + "data: {train_data: two.jsonl, eval_data: long.jsonl, duration_sec: 45}\n",
        "the backbone's data format",
        files={**_TWO, "long.jsonl": '{"path": "c.wav", "duration": 600.0}\n', "c.wav": "sound\n", "c.json": "{}\n"},
    ),
    "TTT508": Explanation(
        "error",
        "Recordings have no transcript beside them: the alignments that give the text stream its words.",
        "A run stops there before its first step; a recording without words would teach silence.",
        _MOSHI + "data: {train_data: mute.jsonl, eval_data: eval.jsonl}\n",
        _GOOD_DATA,
        "moshi-finetune's data format",
        files={**_data("mute.jsonl", '{"path": "mute.wav", "duration": 61.2}'), "mute.wav": "sound\n"},
    ),
    "TTT509": Explanation(
        "error",
        "`init_from` names no run with a complete checkpoint, and no adapter.",
        "A run that silently started anew would be another stage's work lost.",
        _MOSHI + _START.replace("first", "second"),
        _MOSHI + _START,
        "`ttt.adapter_file`",
        files={"first.safetensors": _adapter()},
    ),
    "TTT510": Explanation(
        "error",
        "`init_from` names weights of another backbone, other layers or another inner model.",
        "The tensors would not fit, or would mean something else. What changes no tensor may differ: "
        "`scan_checkpoint_group_size`, where gates start, how long windows are; and, where the config writes them, "
        "`mini_batch_size` and `base_lr`. A default does not change these two.",
        _MOSHI + _START.replace("layers: [1]", "layers: [1], layer_type: linear"),
        _MOSHI + _START.replace("layers: [1]", "layers: [1], initial_gating_alpha: 0.2"),
        "`ttt.adapter_file`",
        files={"first.safetensors": _adapter()},
    ),
    "TTT511": Explanation(
        "note",
        "The run goes on with another `mini_batch_size` or `base_lr` than what it starts from was trained with.",
        "No tensor hangs on them, but the same tensors compute something else. Where that is meant, training goes on.",
        _MOSHI + _START.replace("layers: [1]", "layers: [1], mini_batch_size: 8"),
        _MOSHI + _START,
        "`ttt.adapter_file`",
        files={"first.safetensors": _adapter()},
    ),
    "TTT601": Explanation(
        "error",
        "`run_dir` cannot be made or written.",
        "Nothing of the run could be saved.",
        _MOSHI + "run_dir: notes.txt/run\n",
        _MOSHI + "run_dir: runs/first\n",
        "the file system",
        files={"notes.txt": "a file\n"},
    ),
    "TTT602": Explanation(
        "error",
        "A distributed launcher started this process and others like it, and each would train the same run.",
        "Training is one process on one device. Several would write one folder, and share no gradient. Nothing wraps "
        "the model in DistributedDataParallel for you: in every PyTorch up to 2.13 that fails with reentrant "
        "checkpoints of a layer that runs more than once or has unused parameters (`Expected to mark a variable ready "
        "only once`).",
        _MOSHI + "run_dir: runs/first\n",
        _MOSHI + "run_dir: runs/first\n",
        "torchrun's documentation, Environment Variables; DistributedDataParallel's, on checkpoints; "
        "github.com/pytorch/pytorch, issue 24005",
        environment=("WORLD_SIZE=2",),
    ),
    "TTT603": Explanation(
        "error",
        "`TTT_OPS` forces an implementation of the scan that `torch.compile` cannot take whole.",
        "The fused scan is one operation to the compiler, with a backward of its own. The others recompute groups by "
        "autograd, or run token by token: what is compiled would fall apart, and be slower than what is not.",
        _MOSHI + "train: {compile: true}\n",
        _MOSHI + "train: {compile: false}\n",
        "`ttt.ops.select`",
        environment=("TTT_OPS=generic",),
    ),
    "TTT604": Explanation(
        "error",
        "`train.compile` is asked for, and this machine has no compiler for the run's device.",
        "`torch.compile` makes C++ for a CPU, and Triton kernels for a GPU, for which Triton needs a C compiler too. "
        "The run would stop in its first step. Beside `gradient_checkpointing` and `autocast`, compiling is safe here. "
        "Only the TTT layers are compiled, with sizes as constants: with sizes as variables, a recomputation may take "
        "another compiled version than its first pass did, and end in CheckpointError (github.com/pytorch/pytorch, "
        "issue 166926, open in 2.13). Autocast is off around what is compiled: a compiled backward would run in the "
        "types of its forward, even outside of autocast (issues 153044 and 179804, the default up to 2.13). Compiled "
        "autograd, which keeps what a checkpoint means to spare (issue 143176), stays off.",
        _MOSHI + "train: {compile: true, device: cpu}\n",
        _MOSHI + "train: {compile: false, device: cpu}\n",
        "PyTorch's `torch/_inductor/config.py`; Triton's `triton/runtime/build.py`; github.com/pytorch/pytorch",
        environment=("CXX=a-compiler-that-nobody-has",),
    ),
    "TTT605": Explanation(
        "error",
        "An option of the backbone names a file that is missing, or is not what the backbone reads there.",
        "What the file says decides widths and lengths, so the config cannot be called right without it, and the "
        "model could not be built.",
        "backbone: {name: moshi, preset: 7b, config_path: nowhere.json}\n",
        _MOSHI,
        "the backbone's plugin",
    ),
    "TTT701": Explanation(
        "warning",
        "The run ends before its warm-up does.",
        "The learning rate never reaches `lr`, and what comes after the warm-up never begins.",
        _MOSHI + "train: {warmup_steps: 2000, max_steps: 1000}\n",
        _MOSHI + "train: {warmup_steps: 100, max_steps: 1000}\n",
        "`ttt.train.optim`",
    ),
    "TTT702": Explanation(
        "error",
        "The config has no TTT layers and trains nothing else.",
        "There is nothing to optimise.",
        _MOSHI + "ttt: {layers: none}\n",
        _MOSHI + "ttt: {layers: none}\ntrain: {trainable: all}\n",
        "`ttt.train.optim`",
    ),
    "TTT703": Explanation(
        "error",
        "Gates start at 0 and have a learning rate of 0.",
        "`x + tanh(0) · y` is x: TTT adds nothing, and gets no gradient through a closed gate, to the end.",
        _MOSHI + "ttt: {initial_gating_alpha: 0.0}\ntrain: {alpha_lr_multiplier: 0.0}\n",
        _MOSHI + "ttt: {initial_gating_alpha: 0.0}\ntrain: {alpha_lr_multiplier: 10.0}\n",
        _VIDEO + " starts gates at 0.1",
    ),
    "TTT704": Explanation(
        "warning",
        "Gates start next to closed, and their learning rate cannot open them within the run.",
        "TTT stays below a hundredth of its strength, and what reaches its weights through the gate is as small.",
        _MOSHI + "ttt: {initial_gating_alpha: 0.001}\ntrain: {lr: 1e-6, max_steps: 1000}\n",
        _MOSHI + "ttt: {initial_gating_alpha: 0.001}\ntrain: {lr: 1e-6, max_steps: 1000, alpha_lr_multiplier: 100.0}\n",
        _ADAMW,
    ),
    "TTT705": Explanation(
        "warning",
        "The inner learning rate is more than ten times away from what was trained with: 1.0 for linear, 0.1 for mlp.",
        "Far above, inner steps overshoot and the inner loss rises; far below, fast weights hardly move and the layer "
        "is a fixed one.",
        _MOSHI + "ttt: {base_lr: 10.0}\n",
        _MOSHI + "ttt: {base_lr: 0.5}\n",
        _LM + " and " + _VIDEO,
    ),
    "TTT706": Explanation(
        "warning",
        "Autocast is asked for, and the backbone's parameters are in its type already.",
        "Mixed precision keeps float32 parameters and multiplies in bfloat16. Here nothing is left to spare, and what "
        "the backbone computes in float32 on purpose would be rounded. With `gradient_checkpointing`, and groups of "
        "the scan, autocast is safe here: it runs without PyTorch's cache of casts. With the cache, a weight that was "
        "first used under `no_grad`, as in a reentrant checkpoint, gets no gradient (issues 112583 and 158232; pull "
        "request 165068 of December 2025 mends it, and 2.13 has it), and a checkpoint may raise CheckpointError where "
        "a weight was cast before (issue 141896 since 2.5, and 193338, both open in 2.13).",
        _MOSHI + "train: {autocast: bfloat16, param_dtype: bfloat16}\n",
        _MOSHI + "train: {autocast: bfloat16, param_dtype: float32}\n",
        "PyTorch's documentation of torch.amp; github.com/pytorch/pytorch",
    ),
    "TTT801": Explanation(
        "error",
        "No installed plugin brings the backbone that the config names.",
        "Its options are not known either, so the sections `backbone` and `data` are not checked.",
        "backbone: {name: moshy}\n",
        _MOSHI,
        "`ttt plugins`",
    ),
    "TTT802": Explanation(
        "error",
        "The backbone's plugin is installed but cannot be used.",
        "Something that it imports is missing, or it is made for another version; other plugins go on working.",
        "backbone: {name: broken}  # whose plugin imports a package that is not installed\n",
        _MOSHI,
        _PLUGINS,
        needs="a plugin that cannot be imported, broken",
    ),
    "TTT803": Explanation(
        "error",
        "A plugin raised an error when it was asked about the config.",
        "What it would have said is unknown, so the config cannot be called right.",
        "backbone: {name: failing}  # whose plugin raises an error when it is asked for facts\n",
        _MOSHI,
        _PLUGINS,
        needs="a plugin whose facts fail, failing",
    ),
}
"""By code."""
