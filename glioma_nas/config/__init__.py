"""The configuration of a run: one YAML file, every key checked, units in the names.

Unknown keys are errors with a suggestion. Relative paths are taken from the folder of the YAML file. The resolved
configuration, defaults filled in, is written to the run folder.
"""

from glioma_nas.config.augmentation import AugmentationConfig
from glioma_nas.config.cohort import CohortConfig, FoldsConfig, PreprocessConfig, indicated_by, indicator_of
from glioma_nas.config.latency import ExportConfig, LatencyConfig
from glioma_nas.config.markers import ClassifyConfig, MarkerConfig
from glioma_nas.config.run import ReportConfig, RunConfig, load_config, parse_config
from glioma_nas.config.search import SearchConfig, TrainConfig
from glioma_nas.config.section import Section

__all__ = [
    "AugmentationConfig",
    "ClassifyConfig",
    "CohortConfig",
    "ExportConfig",
    "FoldsConfig",
    "LatencyConfig",
    "MarkerConfig",
    "PreprocessConfig",
    "ReportConfig",
    "RunConfig",
    "SearchConfig",
    "Section",
    "TrainConfig",
    "indicated_by",
    "indicator_of",
    "load_config",
    "parse_config",
]
