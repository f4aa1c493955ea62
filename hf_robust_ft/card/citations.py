"""What to cite: the method, and the loss that was trained."""

from __future__ import annotations

JU = """@inproceedings{ju2022robust,
  title = {Robust Fine-Tuning of Deep Neural Networks with {Hessian}-based Generalization Guarantees},
  author = {Ju, Haotian and Li, Dongyue and Zhang, Hongyang R.},
  booktitle = {International Conference on Machine Learning},
  year = {2022}
}"""

PATRINI = """@inproceedings{patrini2017making,
  title = {Making Deep Neural Networks Robust to Label Noise: A Loss Correction Approach},
  author = {Patrini, Giorgio and Rozza, Alessandro and Menon, Aditya Krishna and Nock, Richard and Qu, Lizhen},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}"""

KIRYO = """@inproceedings{kiryo2017positive,
  title = {Positive-Unlabeled Learning with Non-Negative Risk Estimator},
  author = {Kiryo, Ryuichi and Niu, Gang and du Plessis, Marthinus C. and Sugiyama, Masashi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}"""

ZHANG = """@inproceedings{zhang2018generalized,
  title = {Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels},
  author = {Zhang, Zhilu and Sabuncu, Mert R.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}"""

GOUK = """@inproceedings{gouk2021distance,
  title = {Distance-Based Regularisation of Deep Networks for Fine-Tuning},
  author = {Gouk, Henry and Hospedales, Timothy M. and Pontil, Massimiliano},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}"""

OF_LOSS = {
    "forward": (PATRINI,),
    "backward": (PATRINI,),
    "posterior": (PATRINI,),
    "nonnegative_backward": (PATRINI, KIRYO),
    "gce": (ZHANG,),
}


def citations(correction: str | None, *, row_sums: bool = False) -> str:
    """BibTeX.

    Args:
        correction: the loss that was trained.
        row_sums: whether layers were constrained in the row-sum norm.
    """
    return "\n\n".join((JU, *OF_LOSS.get(correction or "none", ()), *((GOUK,) if row_sums else ())))
