"""The directory that a plan asks for."""

from cluster.directory.base import Directory
from cluster.directory.file import FileDirectory
from cluster.plan import Plan, load_plan
from cluster.rundir import ClusterFault, RunDir


def open_directory(plan: Plan, run: RunDir) -> Directory:
    """Of the cluster whose plan is in ``run``.

    Raises:
        ClusterFault: the plan cannot be read, or the files for etcd's TLS.
    """
    file = FileDirectory(run.plan_file, lambda: load_plan(run).routers)
    config = plan.config.directory
    if not config.etcd:
        return file
    from cluster.directory.etcd import EtcdDirectory  # an HTTP client takes time to import

    try:
        return EtcdDirectory(config, plan.name, file)
    except OSError as error:
        raise ClusterFault(f"the files of [directory] for TLS cannot be used: {error}") from error
