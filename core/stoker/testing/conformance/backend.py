"""The backend suite, all of it."""

from __future__ import annotations

from stoker.testing.conformance.backend_embedding import BackendEmbedding
from stoker.testing.conformance.backend_lanes import BackendLanes
from stoker.testing.conformance.backend_loading import BackendLoading
from stoker.testing.conformance.backend_memory import BackendMemory
from stoker.testing.conformance.backend_sampling import BackendSampling
from stoker.testing.conformance.backend_speed import BackendSpeed
from stoker.testing.conformance.backend_tokenizer import BackendTokenizer

__all__ = ["BackendConformance"]


class BackendConformance(
    BackendLoading,
    BackendTokenizer,
    BackendLanes,
    BackendMemory,
    BackendSampling,
    BackendEmbedding,
    BackendSpeed,
):
    """Proves a backend right, with a model of your choice::

        class TestMine(BackendConformance):
            @pytest.fixture
            def backend(self, model_path):
                (info,) = my_package.stoker_register_backends()
                model = stoker.LocalModel(path=model_path, model_id="m", reference=str(model_path))
                return BackendUnderTest(info=info, model=model)

    The model is loaded once for all tests of the class. What ``Capabilities`` deny is skipped.
    """
