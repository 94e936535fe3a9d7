"""ComfyUI-PPCL: pruned diffusion transformers, all sizes from one file."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import extension

    return extension()
