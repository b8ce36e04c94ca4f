"""MultipleNegativesRankingLoss against that of sentence-transformers, and in its trainer."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
B, D = 9, 16
WORDS = ["a", "photo", "of", "the", "red", "blue", "small", "cat", "dog", "house", "on", "under"]
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS = {
    "default": {},
    "scale": {"scale": 3.0},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    },
    "joint": {"directions": ("query_to_doc", "doc_to_query")},
    "all four": {"directions": ALL},
    "harder batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "harder own": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "all harder": {
        "hardness_mode": "all_negatives",
        "hardness_strength": 2.0,
        "directions": ALL,
    },
}


@pytest.fixture
def sentence_transformers(need):
    return need("sentence_transformers")


@pytest.fixture
def ours(need, sentence_transformers):
    return need("mmfast.integrations.sentence_transformers")


@pytest.fixture
def theirs(need, sentence_transformers):
    return need("sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking")


def tiny_model(sentence_transformers):
    """Words become the mean of random vectors: a model that needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    static = sentence_transformers.sentence_transformer.modules.StaticEmbedding
    return sentence_transformers.SentenceTransformer(
        modules=[static(tokenizer, embedding_dim=D)], device="cpu"
    )


def outcome(loss, embeddings):
    value = loss.compute_loss_from_embeddings(embeddings, None)
    return value.detach(), torch.autograd.grad(value, embeddings)


def random_embeddings(columns):
    return [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(columns)]


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradients(ours, theirs, options, columns):
    embeddings = random_embeddings(columns)
    got, expected = (
        outcome(module.MultipleNegativesRankingLoss(None, **options), embeddings)
        for module in (ours, theirs)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_dot_products(ours, theirs, sentence_transformers):
    embeddings = random_embeddings(3)
    options = {"similarity_fct": sentence_transformers.util.dot_score, "scale": 1.0}
    got, expected = (
        outcome(module.MultipleNegativesRankingLoss(None, **options), embeddings)
        for module in (ours, theirs)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [OPTIONS["symmetric"], OPTIONS["all harder"]])
def test_devices_gather(ours, theirs, options, monkeypatch):
    embeddings, found = random_embeddings(3), []
    others = {id(x): torch.randn_like(x) for x in embeddings}
    for module in (ours, theirs):
        # as the second of two ranks sees it; normalised embeddings are new tensors
        rest = iter(others.values())
        monkeypatch.setattr(
            module, "all_gather_with_grad", lambda x, rest=rest: torch.cat([next(rest), x])
        )
        monkeypatch.setattr(module, "get_rank", lambda: 1)
        loss = module.MultipleNegativesRankingLoss(
            None,
            gather_across_devices=True,
            similarity_fct=ours.dot_score,
            **{"scale": 1.0} | options,
        )
        found.append(outcome(loss, embeddings))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_keeps_losses_near_zero(ours):
    query = torch.eye(4, dtype=torch.float64, requires_grad=True)
    loss = ours.MultipleNegativesRankingLoss(None, scale=45.0)
    value = loss.compute_loss_from_embeddings([query, torch.eye(4, dtype=torch.float64)], None)
    expected = torch.log1p(3 * torch.tensor(-45.0, dtype=torch.float64).exp())
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_nothing_grows_with_the_square_of_the_batch(ours, largest_tensor):
    embeddings = [torch.randn(1024, 8, requires_grad=True) for _ in range(3)]
    loss = ours.MultipleNegativesRankingLoss(None, **OPTIONS["all harder"])
    with largest_tensor:
        loss.compute_loss_from_embeddings(embeddings, None).backward()
    assert largest_tensor.bytes <= 2 * 1024 * 8 * 4


def test_trainer_takes_the_same_two_steps(need, sentence_transformers, ours, theirs, tmp_path):
    datasets = need("datasets")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (16, 3, 4), generator=generator).tolist()
    texts = [[" ".join(WORDS[i] for i in text) for text in row] for row in rows]
    names = ("anchor", "positive", "negative")
    data = datasets.Dataset.from_dict(dict(zip(names, zip(*texts, strict=True), strict=True)))
    weights = []
    for module in (ours, theirs):
        model = tiny_model(sentence_transformers)
        start = [p.detach().clone() for p in model.parameters()]
        options = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        loss = module.MultipleNegativesRankingLoss(model, **OPTIONS["symmetric"])
        sentence_transformers.SentenceTransformerTrainer(
            model=model, args=options, train_dataset=data, loss=loss
        ).train()
        weights.append([p.detach() for p in model.parameters()])
        assert (weights[-1][0] - start[0]).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_what_it_refuses(ours):
    with pytest.raises(ValueError, match=r"must be cos_sim or dot_score of .*, got <lambda>"):
        ours.MultipleNegativesRankingLoss(None, similarity_fct=lambda x, y: x @ y.T)
    with pytest.raises(ValueError, match="must have 2 columns of texts or more, got 1"):
        ours.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([torch.ones(2, 3)], 0)
