import cluster
import pytest
import small_training


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running cluster; without one that can be started here the tests are skipped."""
    if (why := cluster.missing()) is not None:
        pytest.skip(why)
    with cluster.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The files of a small training."""
    folder = tmp_path_factory.mktemp("training")
    small_training.write(folder)
    return folder
