"""FreeSurfer's tables of a cortical parcellation, as `mris_anatomical_stats` writes them."""

from __future__ import annotations

import numpy as np

from models.anatomy import DESIKAN_KILLIANY, HEMISPHERES, MEASURES, bare_region

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("StructName", "Structure Name", "NA"),
    ("NumVert", "Number of Vertices", "unitless"),
    ("SurfArea", "Surface Area", "mm^2"),
    ("GrayVol", "Gray Matter Volume", "mm^3"),
    ("ThickAvg", "Average Thickness", "mm"),
    ("ThickStd", "Thickness StdDev", "mm"),
    ("MeanCurv", "Integrated Rectified Mean Curvature", "mm^-1"),
    ("GausCurv", "Integrated Rectified Gaussian Curvature", "mm^-2"),
    ("FoldInd", "Folding Index", "unitless"),
    ("CurvInd", "Intrinsic Curvature Index", "unitless"),
)
VERTEX_MM2 = 0.65
"""Area of a vertex of the white surface, about."""
SHAPE_COLUMNS = "  0.120     0.028        0     0.0"
"""Curvature and folding are no part of the phantom: the same in all regions."""


def aparc_stats(subject: str, hemisphere: str, values: np.ndarray) -> bytes:
    """Return `<hemisphere>.aparc.stats` of a subject; values: (3, 68) in the order of MEASURES and DESIKAN_KILLIANY."""
    by_measure = dict(zip(MEASURES, values, strict=True))
    area, volume = by_measure["surface_area_mm2"], by_measure["grey_matter_volume_mm3"]
    thickness = by_measure["cortical_thickness_mm"]
    half = len(DESIKAN_KILLIANY) // 2
    places = range(HEMISPHERES.index(hemisphere) * half, (HEMISPHERES.index(hemisphere) + 1) * half)
    total, mean = float(area[places].sum()), float(np.average(thickness[places], weights=area[places]))
    lines = [
        "# Table of FreeSurfer cortical parcellation anatomical statistics",
        "#",
        "# generating_program brainloom phantom",
        f"# subjectname {subject}",
        f"# hemi {hemisphere}",
        "# AnnotationFile ../label/" + hemisphere + ".aparc.annot",
        f"# Measure Cortex, WhiteSurfArea, White Surface Total Area, {total:.1f}, mm^2",
        f"# Measure Cortex, MeanThickness, Mean Thickness, {mean:.5f}, mm",
        *(
            f"# TableCol {n:2d} {kind} {text}"
            for n, column in enumerate(COLUMNS, start=1)
            for kind, text in zip(("ColHeader", "FieldName", "Units    "), column, strict=True)
        ),
        f"# NTableCols {len(COLUMNS)}",
        "# ColHeaders " + " ".join(name for name, _, _ in COLUMNS),
    ]
    for n in places:
        name = bare_region(DESIKAN_KILLIANY[n])
        lines.append(
            f"{name:40s} {round(area[n] / VERTEX_MM2):6d} {round(area[n]):6d} {round(volume[n]):6d} "
            f" {thickness[n]:.3f} 0.600  {SHAPE_COLUMNS}"
        )
    return ("\n".join(lines) + "\n").encode()
