# For NVIDIA GPUs; not built where the project is developed.
#   docker build -t rankclip .
#   docker run --gpus all -v "$PWD":/data -w /data rankclip train mine.csv --val held_out.csv
FROM python:3.13-slim
COPY . /opt/rankclip_jax
RUN pip install --no-cache-dir "jax[cuda13]" -e /opt/rankclip_jax
ENTRYPOINT ["rankclip"]
