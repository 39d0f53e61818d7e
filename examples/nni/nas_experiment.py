"""A co-search in NNI's own Python interface: python nas_experiment.py RUN_FOLDER OUT_FOLDER [--resume ID]."""

import sys

from nni.nas.experiment import NasExperiment

from glioma_nas.evaluators.latency_table import LatencyTableProfiler
from glioma_nas.evaluators.segmentation import SegmentationEvaluator
from glioma_nas.nni_experiments.checkpoint_serializer import use_safe_checkpoints
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.one_shot import CoSearch

run, out, *resume = sys.argv[1:]
use_safe_checkpoints()  # NNI's own checkpoints cannot be loaded by current PyTorch
space = NASBraNet("tiny", image_size_px=32, in_channels=2, n_classes=2)
evaluator = SegmentationEvaluator(f"{run}/preprocess", ("t1ce", "flair"), folder=out, epochs=3, steps_per_epoch=2)
profiler = LatencyTableProfiler(space, f"{run}/latency/latency_table.json")
strategy = CoSearch(profiler=profiler, pretrain_epochs=1, finetune_steps=2, recalibration_batches=1)
experiment = NasExperiment(space, evaluator, strategy, id=resume[1] if resume else None)
experiment.config.experiment_working_directory = f"{out}/experiments"
experiment.resume() if resume else experiment.run()
samples = experiment.export_top_models(2, formatter="dict")
print("experiment", experiment.id, *(sorted(sample.items())[:3] for sample in samples))
experiment.stop()
