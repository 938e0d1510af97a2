"""What must fit together in one run and in one comparison."""

import dataclasses
from dataclasses import replace

import pytest

from moejax.config import (
  DATA_EXPERT_MODEL,
  Data,
  Evaluation,
  Experiment,
  Losses,
  Measurement,
  Mesh,
  Pair,
  Suite,
)
from moejax.config.experiment import OF_THE_TEXT
from moejax.errors import UserError


def with_training(experiment: Experiment, **fields) -> Experiment:
  return replace(experiment, training=replace(experiment.training, **fields))


def with_model(experiment: Experiment, **fields) -> Experiment:
  return replace(experiment, model=replace(experiment.model, **fields))


def with_moe(experiment: Experiment, **fields) -> Experiment:
  assert experiment.model.moe
  return with_model(experiment, moe=replace(experiment.model.moe, **fields))


def with_data(experiment: Experiment, **fields) -> Experiment:
  return replace(experiment, data=replace(experiment.data, **fields))


@pytest.mark.parametrize("name", ["batch_size", "max_tokens", "every"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_evaluation_has_sizes_above_0(name, value):
  with pytest.raises(UserError, match=rf"^evaluation\.{name}={value} must be above 0$"):
    Evaluation(**{name: value})


def test_an_evaluation_may_score_all_tokens_at_the_end_only():
  assert Evaluation(max_tokens=None, every=None).max_tokens is None


@pytest.mark.parametrize("name", ["warmup_steps", "rounds", "steps_per_round"])
def test_a_measurement_has_counts_above_0(name):
  with pytest.raises(UserError, match=rf"^measurement\.{name}=0 must be above 0$"):
    Measurement(**{name: 0})


@pytest.mark.parametrize("loss", ["load_balance", "router_z"])
def test_a_coefficient_whose_loss_no_layer_returns_is_refused(tiny_dense, tiny_moe, loss):
  losses = Losses(**{loss: 0.1})
  assert with_training(tiny_moe, losses=losses).training.losses == losses
  with pytest.raises(
    UserError,
    match=rf"^training\.losses\.{loss}=0\.1 would have no effect: no layer is sparse; set it to 0 or set model\.moe$",
  ):
    with_training(tiny_dense, losses=losses)


def test_the_z_loss_of_the_logits_needs_no_sparse_layer(tiny_dense):
  assert with_training(tiny_dense, losses=Losses(z=1e-4)).training.losses.z == 1e-4


def test_the_batch_that_is_computed_at_once_is_a_part_of_the_step(tiny_dense):
  assert tiny_dense.micro_batch_size == 8
  assert with_training(tiny_dense, gradient_accumulation=4).micro_batch_size == 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda e: with_moe(e, group_size=48),
      r"moe\.group_size=48 does not divide the 256 tokens of training\.batch_size / gradient_accumulation "
      r"\(8 sequences of 32\)",
    ),
    (
      lambda e: with_moe(with_training(e, gradient_accumulation=8), group_size=64),
      r"moe\.group_size=64 does not divide the 32 tokens of training\.batch_size / gradient_accumulation "
      r"\(1 sequences of 32\)",
    ),
    (
      lambda e: with_moe(replace(e, evaluation=Evaluation(batch_size=1)), group_size=64),
      r"moe\.group_size=64 does not divide the 32 tokens of evaluation\.batch_size \(1 sequences of 32\)",
    ),
  ],
  ids=["training", "a part of the training batch", "evaluation"],
)
def test_routing_groups_fill_what_is_computed_at_once(tiny_moe, change, message):
  with pytest.raises(UserError, match=f"^{message}; use a group size that does$"):
    change(tiny_moe)


def test_groups_do_not_matter_to_a_dense_model(tiny_dense):
  assert replace(tiny_dense, evaluation=Evaluation(batch_size=1)).evaluation.batch_size == 1


def on(experiment: Experiment, **axes: int) -> Experiment:
  return replace(experiment, mesh=Mesh(**axes))


@pytest.mark.parametrize(
  ("change", "what", "size", "parts"),
  [
    (lambda e: on(e, data=3), r"training\.batch_size / gradient_accumulation", "batch=8", 3),
    (lambda e: on(e, replica=3), r"training\.batch_size / gradient_accumulation", "batch=8", 3),
    (lambda e: on(e, expert=3), r"training\.batch_size / gradient_accumulation", "batch=8", 3),
    (
      lambda e: on(with_training(e, gradient_accumulation=4), data=4),
      r"training\.batch_size / gradient_accumulation",
      "batch=2",
      4,
    ),
    (lambda e: on(with_training(e, batch_size=12), data=3), r"evaluation\.batch_size", "batch=8", 3),
    (lambda e: on(with_model(e, d_model=12), data=8), r"model\.d_model", "embed=12", 8),
    (lambda e: on(e, model=8), r"model\.num_heads", "heads=4", 8),
    (lambda e: on(with_model(e, vocab_size=263), model=2), r"model\.vocab_size", "vocab=263", 2),
    (lambda e: on(with_model(e, d_ff=25), model=2), r"model\.d_ff", "mlp=25", 2),
  ],
)
def test_a_dimension_that_the_mesh_does_not_divide_is_refused_with_its_field(tiny_dense, change, what, size, parts):
  with pytest.raises(UserError, match=rf"^{what}: {size} is not divisible by the {parts} shards that mesh \("):
    change(tiny_dense)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda e: on(e, expert=8),
      r"moe\.num_experts: experts=4 is not divisible by the 8 shards that mesh "
      r"\(replica 1 x data \? x expert 8 x model 1\) gives it through expert; change one of them",
    ),
    (
      lambda e: on(with_moe(e, d_ff=7), model=2),
      r"moe\.num_experts: expert_mlp=7 is not divisible by the 2 shards that mesh .* through model; change one of them",
    ),
    (
      lambda e: on(with_moe(e, group_size=128), data=4),
      r"training\.batch_size / gradient_accumulation: 8 sequences have 2 routing groups of moe\.group_size=128, which "
      r"are not divisible by the 4 shards of mesh \(replica 1 x data 4 x expert 1 x model 1\); lower moe\.group_size "
      r"or raise the batch size",
    ),
    (
      lambda e: on(with_moe(with_training(e, batch_size=16), group_size=128), data=2, expert=2),
      r"evaluation\.batch_size: 8 sequences have 2 routing groups of moe\.group_size=128, which are not divisible.*",
    ),
  ],
  ids=["experts", "their hidden width", "training groups", "evaluation groups"],
)
def test_experts_and_groups_that_the_mesh_does_not_divide_are_refused(tiny_moe, change, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    change(tiny_moe)


def test_the_dense_width_of_a_model_without_dense_layers_does_not_matter(tiny_moe):
  every_layer = with_moe(tiny_moe, every=1)
  assert on(with_model(every_layer, d_ff=25), model=2).model.d_ff == 25
  with pytest.raises(UserError, match=r"^model\.d_ff: mlp=25 is not divisible"):
    on(with_model(tiny_moe, d_ff=25), model=2)


def test_a_mesh_that_divides_everything_is_taken(tiny_moe):
  assert on(tiny_moe, data=2, expert=2, model=2).mesh.size == 8


def test_an_open_data_axis_is_checked_once_it_is_known(tiny_dense):
  experiment = with_training(tiny_dense, batch_size=12)  # which 8 devices would not divide, but are there 8?
  with pytest.raises(UserError, match=r"^training\.batch_size / gradient_accumulation: batch=12 is not divisible by"):
    replace(experiment, mesh=experiment.mesh.resolve(8))


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("nonsense", ("data",)),), r"rules: no tensor has a logical axis 'nonsense'; the logical axes are "),
    ((("embed", ("fsdp",)),), r"rules: 'embed' names an unknown mesh axis 'fsdp'; the mesh axes are "),
    (
      (("sequence", ("data",)),),
      r"training\.batch_size / gradient_accumulation: rules map both 'batch' and 'sequence' to mesh axis 'data'$",
    ),
    ((("heads", ("data",)),), r"model\.num_heads: rules map both 'embed' and 'heads' to mesh axis 'data'$"),
  ],
)
def test_rules_that_cannot_be_meant_are_refused(tiny_dense, rules, message):
  with pytest.raises(UserError, match=f"^{message}"):
    replace(tiny_dense, rules=DATA_EXPERT_MODEL + rules)


def test_rules_without_an_axis_are_refused(tiny_dense):
  with pytest.raises(UserError, match=r"^rules: no rule for layers; "):
    replace(tiny_dense, rules=DATA_EXPERT_MODEL[1:])


def test_the_dense_member_of_a_pair_has_no_sparse_layer(tiny_moe):
  with pytest.raises(
    UserError, match=r"^the dense member 'sparse' of a pair has sparse layers; set model\.moe to None$"
  ):
    Pair(dense=tiny_moe, candidates=(tiny_moe,))


def test_a_pair_has_a_candidate(tiny_dense):
  with pytest.raises(UserError, match=r"^the pair of 'dense' has no candidates; give it at least one MoE experiment$"):
    Pair(dense=tiny_dense, candidates=())


def test_a_candidate_has_a_sparse_layer(tiny_dense, tiny_moe):
  other = replace(tiny_dense, name="other")
  with pytest.raises(
    UserError, match=r"^candidate 'other' for 'dense' has no sparse layer; set model\.moe, or a mixture of"
  ):
    Pair(dense=tiny_dense, candidates=(tiny_moe, other))


def test_a_candidate_reads_what_the_dense_member_reads_but_may_read_ahead(tiny_dense, tiny_moe):
  Pair(dense=tiny_dense, candidates=(with_data(tiny_moe, prefetch=2),))
  with pytest.raises(
    UserError, match=r"^candidate 'sparse' does not read the same data as 'dense'; use the same data$"
  ):
    Pair(dense=tiny_dense, candidates=(with_data(tiny_moe, seed=1),))


def test_the_members_of_a_suite_are_each_dense_one_and_then_its_candidates(tiny_suite):
  assert [member.name for member in tiny_suite.members] == ["dense", "sparse", "wide"]


def test_members_of_a_suite_have_names_of_their_own(tiny_dense, tiny_moe):
  pair = Pair(dense=tiny_dense, candidates=(tiny_moe,))
  with pytest.raises(UserError, match=r"^suite 's' has two members named dense, sparse; names must differ$"):
    Suite(name="s", pairs=(pair, pair))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda e: with_data(e, train=("other.txt",)),
      r"data\.train is \('python-standard-library',\) in 'dense' but \('other\.txt',\) in 'b_dense'",
    ),
    (lambda e: with_data(e, validation=("v.txt",)), r"data\.validation is \(\) in 'dense' but \('v\.txt',\) in .*"),
    (lambda e: with_data(e, document_length=9), r"data\.document_length is None in 'dense' but 9 in 'b_dense'"),
    (lambda e: with_data(e, deduplicate=True), r"data\.deduplicate is False in 'dense' but True in 'b_dense'"),
    (lambda e: with_data(e, validation_fraction=0.1), r"data\.validation_fraction is 0\.05 in 'dense' but 0\.1 in .*"),
    (
      lambda e: replace(e, evaluation=replace(e.evaluation, max_tokens=9)),
      r"evaluation\.max_tokens is 1000000 in 'dense' but 9 in 'b_dense'",
    ),
  ],
)
def test_all_pairs_of_a_suite_have_one_text(tiny_dense, tiny_moe, change, message):
  first = Pair(dense=tiny_dense, candidates=(tiny_moe,))
  second = Pair(
    dense=change(replace(tiny_dense, name="b_dense")), candidates=(change(replace(tiny_moe, name="b_sparse")),)
  )
  with pytest.raises(UserError, match=rf"^suite 's': {message}; all members must have the same text$"):
    Suite(name="s", pairs=(first, second))


def test_a_suite_without_pairs_is_refused():
  with pytest.raises(UserError, match=r"^suite 's' has no pairs; give it at least one$"):
    Suite(name="s", pairs=())


def test_every_field_of_the_data_is_of_the_text_or_may_differ_between_the_pairs_of_a_suite():
  of_the_text = {name for group, name in OF_THE_TEXT if group == "data"}
  assert of_the_text | {"packing", "sequence_length", "seed", "prefetch"} == {f.name for f in dataclasses.fields(Data)}


def test_pairs_of_other_sequence_lengths_cannot_share_a_seqio_task_that_may_read_them(tiny_dense, tiny_moe):
  def suite(train: str) -> Suite:
    pairs = []
    for length in (32, 64):
      text = {"train": (train,), "validation": ("v",), "sequence_length": length}
      dense = with_data(replace(tiny_dense, name=f"dense_{length}"), **text)
      pairs.append(Pair(dense=dense, candidates=(with_data(replace(tiny_moe, name=f"moe_{length}"), **text),)))
    return Suite(name="s", pairs=tuple(pairs))

  assert len(suite("a.txt").members) == 4
  with pytest.raises(UserError, match=r"data\.sequence_length is 32 in 'dense_32' but 64 in 'dense_64'; all members"):
    suite("seqio:tasks/lm")


def test_candidates_are_scored_on_what_the_dense_member_is_scored_on(tiny_dense, tiny_moe):
  scored = replace(tiny_moe, evaluation=replace(tiny_moe.evaluation, max_tokens=None))
  with pytest.raises(UserError, match=r"^suite 's': evaluation\.max_tokens is 1000000 in 'dense' but None in 'sparse'"):
    Suite(name="s", pairs=(Pair(dense=tiny_dense, candidates=(scored,)),))


def test_pairs_of_a_suite_may_differ_in_the_length_of_their_sequences(tiny_dense, tiny_moe):
  longer = [with_data(replace(e, name=f"long_{e.name}"), sequence_length=64) for e in (tiny_dense, tiny_moe)]
  first = Pair(dense=tiny_dense, candidates=(tiny_moe,))
  assert len(Suite(name="s", pairs=(first, Pair(dense=longer[0], candidates=(longer[1],)))).members) == 4


@pytest.mark.parametrize("tolerance", [-0.01, 1.01, float("nan")])
def test_a_tolerance_is_a_part_of_the_step_time(tiny_suite, tolerance):
  with pytest.raises(UserError, match=rf"^suite\.tolerance={tolerance} must lie between 0\.0 and 1\.0$"):
    replace(tiny_suite, tolerance=tolerance)


def test_a_suite_trains_all_or_the_matched(tiny_suite):
  assert replace(tiny_suite, train="matched").train == "matched"
  with pytest.raises(UserError, match=r"^suite\.train='none' is not one of all, matched$"):
    replace(tiny_suite, train="none")


def test_an_experiment_is_frozen_down_to_its_leaves(tiny_moe):
  for part in (tiny_moe, tiny_moe.model, tiny_moe.model.moe, tiny_moe.data, tiny_moe.training, tiny_moe.mesh):
    assert part.__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(part, dataclasses.fields(part)[0].name, None)
  assert hash(tiny_moe) == hash(replace(tiny_moe))


@pytest.mark.parametrize(
  ("depth", "coefficient", "length", "message"),
  [
    (1, 0.0, 32, r"model\.multi_token_depth=1 would have no effect with training\.losses\.multi_token=0; set it,"),
    (0, 0.3, 32, r"training\.losses\.multi_token=0\.3 would have no effect: model\.multi_token_depth is 0;"),
    (32, 0.3, 32, r"model\.multi_token_depth=32 needs sequences of at least 33 tokens, but data\.sequence_length=32"),
    (-1, 0.3, 32, r"model\.multi_token_depth=-1 must"),
  ],
)
def test_multi_token_prediction_whose_loss_would_be_zero_is_refused(tiny_dense, depth, coefficient, length, message):
  losses = Losses(multi_token=coefficient)
  with pytest.raises(UserError, match=f"^{message}"):
    replace(
      tiny_dense,
      model=replace(tiny_dense.model, multi_token_depth=depth),
      training=replace(tiny_dense.training, losses=losses),
      data=replace(tiny_dense.data, sequence_length=length),
    )
  if depth == 32:
    training = replace(tiny_dense.training, losses=losses)
    replace(tiny_dense, model=replace(tiny_dense.model, multi_token_depth=31), training=training)
