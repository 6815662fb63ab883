"""Losses by family; importing this package fills the registry."""

from .._moved import moved_names
from .averaged_labels import ELR, SAT, SELC
from .base import Loss, Sum
from .bi_tempered import BiTempered
from .co_teaching import S2E, CoTeaching, CoTeachingPlus, S2ESchedule, SmallLoss
from .curriculum import MentorNet
from .distill import AEKD, AVER, CAMKD, EBKD, KD, LabelRevision
from .distill_camkd import CAMKDFeatures
from .distill_contrast import CRD
from .distill_features import AT, VID, FitNet
from .distill_logits import DIST, DKD, NKD, WTTM
from .distill_relations import PKT, RKD, SP
from .dmi import DMI
from .gradients import mask_noncritical_
from .jocor import JoCoR
from .masked import MaskedLoss
from .mixing import DivideMix, ELRPlus
from .mixture import GMMSelector, clean_probability, estimate_noise_rate
from .mutual import SMKD, LowEntropy, Mutual, SelectAll, SelectNone, Selector
from .online import DML, KDCL, MKD
from .online_features import AFD, FFL, PCL
from .refined import CE, BootHard, BootSoft, ConfidencePenalty, LabelSmoothing, Refined
from .registry import create_loss, list_losses, loss_class, register_loss
from .robust import APL, GCE, MAE, NCE, NFL, RCE, SCE, TruncatedGCE
from .sample_memory import Joint, SoftLabels
from .self_trust import MyLC, ProSelfLC, calibrated_certainty
from .teacher_free import TfKDReg, TfKDSelf
from .transition import BackwardCorrection, ForwardCorrection, TRevision

__all__ = [
    "AEKD",
    "AFD",
    "APL",
    "AT",
    "AVER",
    "CAMKD",
    "CE",
    "CRD",
    "DIST",
    "DKD",
    "DMI",
    "DML",
    "EBKD",
    "ELR",
    "FFL",
    "GCE",
    "KD",
    "KDCL",
    "MAE",
    "MKD",
    "NCE",
    "NFL",
    "NKD",
    "PCL",
    "PKT",
    "RCE",
    "RKD",
    "S2E",
    "SAT",
    "SCE",
    "SELC",
    "SMKD",
    "SP",
    "VID",
    "WTTM",
    "BackwardCorrection",
    "BiTempered",
    "BootHard",
    "BootSoft",
    "CAMKDFeatures",
    "CoTeaching",
    "CoTeachingPlus",
    "ConfidencePenalty",
    "DivideMix",
    "ELRPlus",
    "FitNet",
    "ForwardCorrection",
    "GMMSelector",
    "JoCoR",
    "Joint",
    "LabelRevision",
    "LabelSmoothing",
    "Loss",
    "LowEntropy",
    "MaskedLoss",
    "MentorNet",
    "Mutual",
    "MyLC",
    "ProSelfLC",
    "Refined",
    "S2ESchedule",
    "SelectAll",
    "SelectNone",
    "Selector",
    "SmallLoss",
    "SoftLabels",
    "Sum",
    "TRevision",
    "TfKDReg",
    "TfKDSelf",
    "TruncatedGCE",
    "calibrated_certainty",
    "clean_probability",
    "create_loss",
    "estimate_noise_rate",
    "list_losses",
    "loss_class",
    "mask_noncritical_",
    "register_loss",
]

__getattr__ = moved_names(__name__)
