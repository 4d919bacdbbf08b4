# The trainer on a GPU host. Build at the root of a checkout; the host needs an NVIDIA driver and its container toolkit.
#   docker build -t trilevel .
#   docker run --rm --gpus all --shm-size=24g -v "$PWD:/work" trilevel doctor
#   docker run --rm --gpus all --shm-size=24g -v "$PWD:/work" --entrypoint python trilevel -m launch local CONFIG
# "devel": DeepSpeed compiles small extensions on first use and looks for nvcc when it is imported. The CUDA that torch of constraints.txt
# is built for: DeepSpeed refuses to compile its CUDA extensions by another one.
FROM nvidia/cuda:13.2.1-devel-ubuntu24.04

RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends g++ git python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# libraries first: a change of our code does not install them again
WORKDIR /opt/trilevel
COPY constraints.txt ./
RUN sed -n '/^torch==/p; /^torchvision==/p; /^deepspeed==/p; /^timm==/p; /^mlflow==/p' constraints.txt > first.txt \
 && pip install --no-cache-dir -c constraints.txt -r first.txt

COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY sparsity sparsity
COPY trainer trainer
COPY launch launch
RUN pip install --no-cache-dir -c constraints.txt -e '.[s3]'

# runs, shards and configurations of the user are mounted here
WORKDIR /work
ENTRYPOINT ["trilevel"]
CMD ["doctor"]
