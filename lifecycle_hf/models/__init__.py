"""Models by name or path, the heads on them, and the adapters in them."""

import logging

# On CPUs with AVX512-BF16 bitsandbytes asks the Hub for a kernel when it is imported, and works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
