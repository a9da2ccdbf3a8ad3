import gzip
import http.server
import threading

import pytest
import wandb

from commkit.config import validate
from commkit.metrics import JsonLinesSink, TensorBoardSink, WandbSink
from launch import sinks
from launch.rundir import RunDirectory
from launch.settings import TrainSettings


def settings(**fields):
    return validate(TrainSettings, {"scheme": {"name": "powersgd"}, **fields}, "test.yaml")


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def kinds(opened):
    return [type(sink) for sink in opened]


def test_a_recipe_that_asks_for_nothing_gets_json_lines(run):
    steps, evaluations = sinks.open_sinks(run, settings())
    assert kinds(steps) == kinds(evaluations) == [JsonLinesSink]


def test_sinks_asked_for_get_steps_and_evaluations(run, monkeypatch):
    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_MODE", "disabled")
    steps, evaluations = sinks.open_sinks(run, settings(tensorboard=True, wandb=True))
    assert kinds(steps) == [JsonLinesSink, TensorBoardSink, WandbSink]
    assert steps[1:] == evaluations[1:]
    for sink in {*steps, *evaluations}:
        sink.close()
    wandb.teardown()


def test_opentelemetry_arrives_at_the_endpoint_of_the_environment(run, monkeypatch):
    arrived = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            arrived.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        steps, _ = sinks.open_sinks(run, settings(opentelemetry=True))
        steps[1].write({"step": 1, "loss": 2.5, "wire_bytes": 7})
        steps[1].close()
        server.shutdown()
    (path, body), *_ = arrived
    assert path == "/v1/metrics"
    for words in (b"commkit.loss", b"commkit.wire_bytes", b"commkit.scheme", b"powersgd"):
        assert words in body


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "opentelemetry"])
def test_a_sink_that_is_not_installed_is_refused_before_anything_starts(monkeypatch, name):
    monkeypatch.setattr(sinks, "find_spec", lambda module: None)
    sinks.require_packages(settings())
    with pytest.raises(ValueError, match=rf"{name}: got true.*commkit\[{name}\].*{name}=false"):
        sinks.require_packages(settings(**{name: True}))


def test_a_sink_that_does_not_start_says_why_and_what_to_do(run):
    (run.path / "tensorboard").write_text("a file where a directory should be")
    with pytest.raises(
        RuntimeError, match=r"tensorboard: got true.*tensorboard.*--set tensorboard=false"
    ):
        sinks.open_sinks(run, settings(tensorboard=True))
