"""Forms of data sets that are not read: how their files are named, what they are, and what to do."""

from __future__ import annotations

from trainer.data.shards.source_files import SourceFiles

_PYTHON = "download the python version (cifar-10-python.tar.gz)"
_FORMS = (
    (("data_batch_1.bin", "test_batch.bin"), "CIFAR's binary version", _PYTHON),
    (("data_batch_1.mat", "batches.meta.mat"), "CIFAR's Matlab version", _PYTHON),
    ((".arrow",), "a data set saved by datasets.save_to_disk", "write parquet files: dataset.to_parquet('train.parquet')"),
    ((".tfrecord", ".tfrec"), "TFRecord files", "write them as class folders or webdataset tars"),
    (("-ubyte", "-ubyte.gz"), "MNIST's idx files", "write them as class folders of PNG files"),
    ((".npz", ".npy", ".h5", ".hdf5"), "arrays", "write them as class folders of PNG files"),
    ((".mdb", ".lmdb"), "an LMDB database", "write it as class folders or webdataset tars"),
    ((".mds", ".mds.zstd"), "MosaicML's shards", "write them as class folders or webdataset tars"),
    ((".beton",), "FFCV's file", "write it as class folders or webdataset tars"),
    ((".zip", ".rar", ".7z"), "an archive", "unpack it, then pack the folder"),
    (
        (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
        "compressed tars",
        "pack them one by one: trilevel pack FILE DST --name SPLIT",
    ),
    (
        (".tar",),
        "tars that are neither one per class nor webdataset's",
        "pack them one by one: trilevel pack FILE DST --name SPLIT",
    ),
    ((".parquet",), "parquet files without an image column of {bytes, path}", "save the data set with its images in it"),
)


def what_it_is(files: SourceFiles) -> str:
    """What a source without images holds, and the remedy."""
    for suffixes, what, remedy in _FORMS:
        if found := files.ending(*suffixes):
            return f"it holds {what} ({len(found)} files, e.g. {found[0].name!r}), which pack does not read; {remedy}"
    return f"it holds {len(files.others)} other files" + (f", e.g. {min(files.others)!r}" if files.others else "")
