"""Drop from a run the sequences that some case lacks, before any stage asks how many channels there are."""

from __future__ import annotations

from glioma_nas.config import RunConfig
from glioma_nas.errors import CohortError


def without_incomplete_sequences(config: RunConfig) -> RunConfig:
    """Return the configuration without the sequences that some case lacks, if ``cohort.missing_sequence`` is ``drop``.

    The sequences of the markers go too. What was dropped stands in ``cohort.dropped_sequences``, so the result is in
    the run's ``config.yaml`` and a second call changes nothing.

    Raises:
        CohortError: Nothing would be left for the networks or for a marker, or the sheet cannot be used.
    """
    if config.cohort.missing_sequence != "drop":
        return config
    from glioma_nas.cohort import read_cohort

    names = dict.fromkeys(config.cohort.sequences)
    for marker in config.classify.markers.values():
        names.update(dict.fromkeys(marker.sequences))
    cohort = read_cohort(config.cohort)
    lacking = {name: [case.case_id for case in cohort.cases if name not in case.images] for name in names}
    dropped = tuple(name for name, cases in lacking.items() if cases)
    if not dropped:
        return config
    detail = "; ".join(f"{len(lacking[name])} cases lack {name}, the first is {lacking[name][0]}" for name in dropped)
    users = {"cohort.sequences": config.cohort.sequences}
    users.update({f"classify.markers.{name}": marker.sequences for name, marker in config.classify.markers.items()})
    for where, wanted in users.items():
        if not set(wanted) - set(dropped):
            raise CohortError(
                f"{config.cohort.sheet}: cohort.missing_sequence 'drop' leaves no sequence to {where} ({detail}); "
                "choose 'exclude', 'zero' or 'indicator', or add the files"
            )

    def kept(wanted: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in wanted if name not in dropped)

    markers = {
        name: marker.model_copy(update={"sequences": kept(marker.sequences)})
        for name, marker in config.classify.markers.items()
    }
    cohort_config = config.cohort.model_copy(
        update={
            "sequences": kept(config.cohort.sequences),
            "dropped_sequences": (*config.cohort.dropped_sequences, *dropped),
        }
    )
    classify = config.classify.model_copy(update={"markers": markers})
    return config.model_copy(update={"cohort": cohort_config, "classify": classify})
