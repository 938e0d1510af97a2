"""Converts models in Hugging Face format to runs, and back."""

import json
import pathlib
import shutil

from moejax.config.data import BYTES, Data
from moejax.config.experiment import Experiment
from moejax.config.optimizer import AdamW
from moejax.config.training import Losses, Training
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.errors import UserError
from moejax.files import write_json
from moejax.inference.load import load_run
from moejax.interop.configs import (
  check_model,
  config_of,
  family_of,
  max_length,
  model_of,
  multi_token_modules,
  read_text_config,
)
from moejax.interop.families import FAMILIES
from moejax.interop.first_checkpoint import check_new_run, save_first, spec_of_new_run
from moejax.interop.safetensors import open_folder, write_folder
from moejax.interop.weights import arrays_of, layout, read_parameters, tensors_of
from moejax.progress import SILENT, Progress
from moejax.training.prepare import on_devices
from moejax.training.run_directory import RUN, prepare_directory

TOKENIZER = "tokenizer"
"""Folder of a run with the files of its tokenizer."""

TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files of the tokenizer of a Hugging Face model."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes of exported weights: their names in PyTorch and in safetensors."""


def imported_experiment(
  folder: pathlib.Path, directory: pathlib.Path, load_balance: float | None, sequence_length: int | None
) -> Experiment:
  """Makes the experiment of a run that starts from a Hugging Face model. Data, training and optimizer can be changed.

  Args:
    folder: folder of the model.
    directory: directory of the run.
    load_balance: training.losses.load_balance of a sparse model, or None for a dense model.
    sequence_length: number of tokens per training sequence. None uses the maximum length of the model.

  Raises:
    UserError: If the model is not supported, or `load_balance` is missing or has no effect.
  """
  config, _ = read_text_config(folder)
  family, model = family_of(config), model_of(config, sequence_length)
  if model.moe and load_balance is None:
    theirs = config.get(family.balance_loss) if family.balance_loss else None
    raise UserError(
      f"{folder} has sparse layers, whose training needs the coefficient of the load-balancing loss; set "
      f"--load-balance X, or 0 for no loss"
      + (f" (config.json has {family.balance_loss}={theirs})" if theirs is not None else "")
    )
  if not model.moe and load_balance is not None:
    raise UserError(f"--load-balance {load_balance:g} has no effect because {folder} has no sparse layers; remove it")
  files = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
  return Experiment(
    name=directory.absolute().name,
    model=model,
    data=Data(
      sequence_length=max_length(config) if sequence_length is None else sequence_length,
      tokenizer=str(directory.absolute() / TOKENIZER / files[0]) if files else BYTES,
    ),
    training=Training(batch_size=16, steps=1000, losses=Losses(load_balance=load_balance or 0.0)),
    optimizer=AdamW(learning_rate=1e-5),
  )


def import_model(
  folder: pathlib.Path, directory: pathlib.Path, experiment: Experiment, progress: Progress = SILENT
) -> None:
  """Creates a run of this experiment at step 0 with the weights of a Hugging Face model.

  Each shard of a parameter is loaded from the files to its device.

  Raises:
    UserError: If the directory contains a run, or the weights do not match the experiment.
  """
  config, prefix = read_text_config(folder)
  check_model(config, experiment.model, experiment.data.sequence_length)
  files = open_folder(folder).within(prefix)
  check_new_run(directory)
  for name in TOKENIZER_FILES:
    (directory / TOKENIZER / name).unlink(missing_ok=True)  # of an import of another model that failed
    if (folder / name).is_file():
      (directory / TOKENIZER).mkdir(exist_ok=True)
      shutil.copyfile(folder / name, directory / TOKENIZER / name)
  if experiment.data.tokenizer == BYTES:
    progress.note(
      f"warning: {folder} has no tokenizer.json or tokenizer.model, so text is read as bytes; if the model has another "
      "tokenizer, save it in one of these formats, or set data.tokenizer"
    )
  (placed,) = on_devices([experiment], make_tokenizer(experiment.data.tokenizer))
  spec = spec_of_new_run(placed, directory)
  progress.stage(f"read {folder}")
  if prefix:
    progress.note(f"{folder} is a model with images: only its text model is imported")
  modules = multi_token_modules(config)
  if ignored := sorted({module for module in modules for name in files.places if name.startswith(module)}):
    progress.note(f"{', '.join(ignored)}*: the modules for multi-token prediction are not imported")
  parameters = read_parameters(files, spec.model, family_of(config), modules)
  progress.stage(f"write {directory}")
  save_first(spec, parameters, directory)


def export_model(
  directory: pathlib.Path, folder: pathlib.Path, dtype: str = "float32", progress: Progress = SILENT
) -> dict[str, object]:
  """Writes the latest checkpoint of a run as a Hugging Face model. Returns the content of config.json.

  Args:
    directory: directory of the run.
    folder: output folder.
    dtype: dtype of the weights, a key of DTYPES.
    progress: receives progress reports, and a note if the tokenizer cannot be exported.

  Raises:
    UserError: If no family supports the model, or the folder contains a model or a run.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
  loaded = load_run(directory, warn=progress.note)
  experiment = loaded.experiment
  config = config_of(experiment.model, experiment.data.sequence_length, dtype)
  prepare_directory(folder, "HF_DIR")
  written = (RUN, "*.safetensors*", "config.json", *TOKENIZER_FILES)
  if present := [path.name for pattern in written for path in sorted(folder.glob(pattern))]:
    raise UserError(f"{folder} contains {present[0]}; choose another folder")
  places = layout(experiment.model, loaded.parameters, FAMILIES[str(config["model_type"])])
  tensors = list(tensors_of(places).items())
  progress.stage(f"write {folder}")
  write_folder(folder, tensors, (array for _, array in arrays_of(places, loaded.parameters)), DTYPES[dtype])
  tokenizer = make_tokenizer(experiment.data.tokenizer)
  config |= {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
  _write_tokenizer(directory, folder, experiment.data.tokenizer, tokenizer, progress)
  write_json(folder / "config.json", config)
  return config


def _write_tokenizer(
  directory: pathlib.Path, folder: pathlib.Path, name: str, tokenizer: Tokenizer, progress: Progress
) -> None:
  """Copies the files of a run's tokenizer, or makes those that transformers needs beside a tokenizer.json."""
  own = directory / TOKENIZER
  path = pathlib.Path(name)
  if own.is_dir():
    for file in sorted(own.iterdir()):
      shutil.copyfile(file, folder / file.name)
  elif path.suffix == ".json":
    shutil.copyfile(path, folder / "tokenizer.json")
    content = json.loads(path.read_text())
    ids = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    specials = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "pad_token": tokenizer.padding}
    named = {key: ids[i] for key, i in specials.items() if i in ids}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
  elif path.suffix == ".model":
    shutil.copyfile(path, folder / "tokenizer.model")
  else:
    progress.note(f"warning: data.tokenizer={name!r} cannot be converted, so {folder} has no tokenizer")
