"""Trains, fails to push, pushes, and reads all back from the Hub that HF_ENDPOINT names; tests/test_push.py starts it.

python pushing.py FOLDER [TOKEN]

What was found goes to FOLDER/found.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from hf_robust_ft import HessianReport, push_folder

ID = "me/model"


def accuracy(prediction: object) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}  # type: ignore[attr-defined]


def main(folder: Path, token: str | None) -> None:
    trainer = tiny.trainer(
        folder / "out",
        push_to_hub=True,
        hub_model_id=ID,
        hub_token=token,
        hub_private_repo=True,
        hessian_examples=4,
        hessian_time_budget=0,
        eval_strategy="epoch",
        eval_dataset=tiny.texts(6, seed=1),
        compute_metrics=accuracy,
        num_train_epochs=1,
        max_steps=-1,
    )
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    trainer.processing_class = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    trainer.train()  # the Hub refuses the first commit
    commit = push_folder(folder / "out", ID, token=token)

    model = AutoModelForSequenceClassification.from_pretrained(ID, token=token)
    mine, theirs = trainer.model.state_dict(), model.state_dict()
    card = ModelCard.load(ID, token=token)
    found = {
        "weights_equal": mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine),
        "words": len(AutoTokenizer.from_pretrained(ID, token=token)),
        "card_name": card.data.model_name,
        "metrics": [result.metric_type for result in card.data.eval_results],
        "report_layers": len(HessianReport.load(hf_hub_download(ID, "hessian_report.json", token=token)).layers),
        "commit": commit.oid if commit.oid == HfApi().model_info(ID, token=token).sha else None,
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
