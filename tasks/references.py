"""What a paper cites that was made with brainloom: the references by key, and text that numbers them as it goes."""

from __future__ import annotations

from collections.abc import Sequence

REFERENCES: dict[str, str] = {
    "brainmvp": (
        "Rui S. et al. Multi-modal Vision Pre-training for Medical Image Analysis. CVPR 2025, 5164-5174 "
        "(arXiv 2410.10604)."
    ),
    "anatcl": (
        "Barbano C. A., Brunello M., Dufumier B., Grangetto M. Anatomical Foundation Models for Brain MRIs. "
        "Pattern Recognition Letters 199 (2026) 178-184. doi 10.1016/j.patrec.2025.11.028."
    ),
    "cinp": (
        "Hu, Wang, Xiao. Learning 3D Medical Image Models From Brain Functional Connectivity Network "
        "Supervision For Mental Disorder Diagnosis. MICCAI 2025 (arXiv 2503.04205)."
    ),
    "simclr": (
        "Chen T. et al. A Simple Framework for Contrastive Learning of Visual Representations. ICML 2020 "
        "(arXiv 2002.05709)."
    ),
    "yaware": (
        "Dufumier B. et al. Contrastive Learning with Continuous Proxy Meta-data for 3D MRI Classification. "
        "MICCAI 2021 (arXiv 2106.08808)."
    ),
    "expw": (
        "Barbano C. A. et al. Contrastive learning for regression in multi-site brain age prediction. ISBI "
        "2023 (arXiv 2211.08326)."
    ),
    "mae": "He K. et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022 (arXiv 2111.06377).",
    "uniformer": (
        "Li K. et al. UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning. "
        "ICLR 2022 (arXiv 2201.04676)."
    ),
    "resnet": "He K. et al. Deep Residual Learning for Image Recognition. CVPR 2016 (arXiv 1512.03385).",
    "vit": (
        "Dosovitskiy A. et al. An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale. "
        "ICLR 2021 (arXiv 2010.11929)."
    ),
    "swin_unetr": (
        "Hatamizadeh A. et al. Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images. "
        "BrainLes 2021 (arXiv 2201.01266)."
    ),
    "nnunet": (
        "Isensee F. et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
        "Nature Methods 18 (2021) 203-211."
    ),
    "combat": (
        "Johnson W. E., Li C., Rabinovic A. Adjusting batch effects in microarray expression data using empirical "
        "Bayes methods. Biostatistics 8 (2007) 118-127."
    ),
    "combat_imaging": (
        "Fortin J.-P. et al. Harmonization of cortical thickness measurements across scanners and sites. NeuroImage "
        "167 (2018) 104-120."
    ),
    "n4": (
        "Tustison N. J. et al. N4ITK: Improved N3 Bias Correction. IEEE Transactions on Medical Imaging 29 "
        "(2010) 1310-1320."
    ),
    "ants": (
        "Avants B. B. et al. A reproducible evaluation of ANTs similarity metric performance in brain image "
        "registration. NeuroImage 54 (2011) 2033-2044."
    ),
    "mni152": (
        "Fonov V. et al. Unbiased average age-appropriate atlases for pediatric studies. NeuroImage 54 (2011) 313-327."
    ),
    "hall": (
        "Hall P. On the Removal of Skewness by Transformation. Journal of the Royal Statistical Society B 54 (1992) "
        "221-228."
    ),
    "bca": "Efron B., Tibshirani R. J. An Introduction to the Bootstrap. Chapman & Hall, 1993.",
    "hesterberg": (
        "Hesterberg T. C. What Teachers Should Know About the Bootstrap. The American Statistician 69 (2015) 371-386."
    ),
    "holm": (
        "Holm S. A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics "
        "6 (1979) 65-70."
    ),
    "nadeau": "Nadeau C., Bengio Y. Inference for the Generalization Error. Machine Learning 52 (2003) 239-281.",
    "ranks": (
        "Wiesenfarth M. et al. Methods and open-source toolkit for analyzing and visualizing challenge "
        "results. Scientific Reports 11 (2021) 2369."
    ),
    "monai": (
        "Cardoso M. J. et al. MONAI: An open-source framework for deep learning in healthcare. arXiv 2211.02701 (2022)."
    ),
    "torch": "Paszke A. et al. PyTorch: An Imperative Style, High-Performance Deep Learning Library. NeurIPS 2019.",
    "scikit-learn": (
        "Pedregosa F. et al. Scikit-learn: Machine Learning in Python. Journal of Machine Learning Research "
        "12 (2011) 2825-2830."
    ),
    "numpy": "Harris C. R. et al. Array programming with NumPy. Nature 585 (2020) 357-362.",
    "scipy": (
        "Virtanen P. et al. SciPy 1.0: Fundamental Algorithms for Scientific Computing in Python. Nature "
        "Methods 17 (2020) 261-272."
    ),
    "nilearn": (
        "Abraham A. et al. Machine learning for neuroimaging with scikit-learn. Frontiers in Neuroinformatics"
        " 8 (2014) 14."
    ),
    "dask": "Rocklin M. Dask: Parallel Computation with Blocked algorithms and Task Scheduling. SciPy 2015, 126-132.",
}
"""Facts of the publications; the wording around them is ours."""


class Citations:
    """Numbers references in the order in which a text cites them."""

    def __init__(self) -> None:
        self._keys: list[str] = []

    def cite(self, *keys: str) -> str:
        """Return ` [1, 3]` for some references; raises KeyError for one that is not in REFERENCES."""
        for key in keys:
            if key not in REFERENCES:
                raise KeyError(f"no reference {key!r}; known: {', '.join(REFERENCES)}")
            if key not in self._keys:
                self._keys.append(key)
        return f" [{', '.join(str(self._keys.index(key) + 1) for key in keys)}]" if keys else ""

    @property
    def references(self) -> Sequence[str]:
        """The cited references in order."""
        return [REFERENCES[key] for key in self._keys]
