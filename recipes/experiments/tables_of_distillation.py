"""The tables of papers on distillation, as options of distill_teachers.py."""

from table import Options, Table, figures

SEVERAL: dict[str, Options] = {
    "AVER": {"preset": "aver"},
    "FitNet-MKD": {"terms": "ce + aver + 100*fitnet"},
    "EBKD": {"preset": "ebkd"},
    "AEKD": {"preset": "aekd"},
    "CA-MKD on logits": {"preset": "camkd_logits"},
    "CA-MKD": {"preset": "camkd"},
}
PAIRS: dict[str, Options] = {
    "ResNet-56, 20": {"teachers": [0], "student": "resnet20_cifar"},
    "ResNet-110, 20": {"teachers": [1], "student": "resnet20_cifar"},
    "ResNet-110, 32": {"teachers": [1], "student": "resnet32_cifar"},
    "ResNet-32x4, 8x4": {"teachers": [2], "student": "resnet8x4_cifar"},
}
# cifar100_noise.py trains the teachers, with the schedule of distill_teachers.py's presets and
# without the part that is held out there.
TEACHER: Options = {
    "method": "ce",
    "noise": "none",
    "holdout": 0.1,
    "num_train_epochs": 240,
    "milestones": [150 / 240, 180 / 240, 210 / 240],
    "per_device_train_batch_size": 64,
    "learning_rate": 0.05,
    "lr_decay": 0.1,
    "weight_decay": 5e-4,
    "optim_args": "momentum=0.9,nesterov=True",
}


def students(title: str, teachers: list[str], rows: dict[str, Options], note: str = "") -> Table:
    """A table of distill_teachers.py. Its teachers are trained first, once for all rows.

    A row has all teachers, or those that its `teachers` names. It learns what its preset or its
    terms say. The preset of the base sets the schedule, which all rows share.
    """
    base = {"student": "resnet10_cifar", "preset": "kd", "teachers": teachers}
    rows = {"student alone": {"terms": "ce", "teachers": []}} | rows
    replaced = "its CIFAR networks are not in timm: ours replace them."
    note = f"The paper's figures could not be read, and {replaced}{note}"
    return Table(title, rows, {"top-1": {}}, base, "distill_teachers.py", note=note)


DISTILLATION = {
    "camkd-1": students(
        "CA-MKD, Table 1: three teachers of one architecture, methods for several teachers",
        ["resnet34_cifar"] * 3,
        SEVERAL,
    ),
    "camkd-2": students(
        "CA-MKD, Table 2: methods for one teacher beside it",
        ["resnet34_cifar"] * 3,
        {
            name: {"preset": name.lower(), "teachers": [0]}
            for name in ("KD", "FitNet", "AT", "VID", "CRD")
        }
        | {"CA-MKD, three teachers": {"preset": "camkd"}},
        note=" Rows of one method have the first teacher.",
    ),
    "camkd-3": students(
        "CA-MKD, Table 3: teachers of different architecture and quality",
        ["resnet34_cifar", "resnet18_cifar", "mobilenetv2_100"],
        SEVERAL,
    ),
    "dkd": Table(
        "DKD, DIST and WTTM on CIFAR-100: one teacher of the same kind",
        rows={
            "student alone": {"terms": "ce", "teachers": []},
            "KD": {"preset": "kd"},
            "KD, standardised": {"preset": "kd_standardized"},
            "DKD": {"preset": "dkd"},
            "DIST": {"preset": "dist"},
            "WTTM": {"preset": "wttm"},
            "RKD": {"preset": "rkd"},
            "SP": {"preset": "sp"},
            "PKT": {"preset": "pkt"},
        },
        columns=PAIRS,
        base={
            "preset": "kd",
            "teachers": ["resnet56_cifar", "resnet110_cifar", "resnet32x4_cifar"],
        },
        recipe="distill_teachers.py",
        cells={
            ("KD, standardised", "ResNet-110, 20"): {"standardize": 4, "terms": "0.1*ce + 12*kd"},
            ("DKD", "ResNet-56, 20"): {"beta": 2},
            ("DKD", "ResNet-110, 32"): {"beta": 2},
            ("WTTM", "ResNet-56, 20"): {"gamma": 0.3, "terms": "ce + 1.5*wttm"},
            ("WTTM", "ResNet-110, 20"): {"gamma": 0.2, "terms": "ce + 2*wttm"},
            ("WTTM", "ResNet-110, 32"): {"terms": "ce + 1.5*wttm"},
        },
        only={"DKD": ["ResNet-56, 20", "ResNet-110, 32", "ResNet-32x4, 8x4"]},
        paper=figures(
            PAIRS,
            {
                "student alone": [69.06, 69.06, 71.14, 72.50],
                "KD": [70.66, 70.67, 73.08, 73.33],
                "KD, standardised": [71.43, 71.48, 74.17, 76.62],
                "DKD": [71.97, None, 74.11, 76.32],
                "DIST": [71.75, 71.65, 73.69, 76.31],
                "WTTM": [71.92, 71.67, 74.13, 76.06],
                "RKD": [69.61, 69.25, 71.82, 71.90],
                "SP": [69.67, 70.04, 72.69, 72.94],
                "PKT": [70.34, 70.25, 72.61, 73.64],
            },
        ),
        note="The figures of DIST and WTTM are as WTTM's paper has them, those of DKD as the "
        "README of its code, those of the standardised KD as its paper, all others as the README "
        "of CRD's code. beta, gamma and the weight of WTTM are the published ones of each pair; "
        "DKD has none for ResNet-110 and 20. Pairs with WRN, VGG, ShuffleNet and MobileNet for "
        "32 px are not here.",
    ),
    "lr-ds": students(
        "Label Revision + Data Selection: one teacher",
        ["resnet34_cifar"],
        {
            "KD": {"terms": "ce + kd"},
            "KD + Label Revision": {"preset": "lr"},
            "KD + Data Selection": {"terms": "ce + kd", "keep": 0.8},
            "KD + Label Revision + Data Selection": {"preset": "lr_ds"},
        },
    ),
}
