"""A program: builds the extension of the checkout that it is started in, by its own ``build.py``.

What that needs of setuptools, which is in no environment and may not be to be had, is here. Prints
the images that belong to a package: JSON, by name the folder whose make builds it.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Extension:
    """An entry of ``ext-modules``."""

    def __init__(self, **settings):
        self.define_macros, self.include_dirs, self.extra_objects = [], [], []
        self.extra_compile_args, self.extra_link_args = [], []
        self.__dict__.update({key.replace("-", "_"): value for key, value in settings.items()})


class Compiler:
    """With the flags that Python was compiled with, and those of ``EXTRA_CFLAGS``."""

    def compile(
        self, sources, output_dir, macros=(), include_dirs=(), extra_preargs=(), extra_postargs=()
    ):
        """Compile each source; the paths of the objects."""
        words = [*_flags("CC", "CFLAGS", "CCSHARED"), *extra_preargs]
        words += shlex.split(os.environ.get("EXTRA_CFLAGS", ""))
        words += [f"-D{name}={value}" for name, value in macros]
        words += [f"-I{path}" for path in (*include_dirs, sysconfig.get_path("include"))]

        def one(source):
            output = Path(output_dir, source).with_suffix(".o")
            output.parent.mkdir(parents=True, exist_ok=True)
            _run([*words, "-c", source, "-o", str(output), *extra_postargs])
            return str(output)

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, sources))


class BuildExtension:
    """``build_ext`` of an editable install."""

    build_temp = "build/temp"

    def __init__(self, extensions):
        self.extensions = extensions
        self.compiler = Compiler()

    def run(self):
        """Build all."""
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext):
        """Build one, beside the modules of its package."""
        objects = self.compiler.compile(
            ext.sources,
            self.build_temp,
            ext.define_macros,
            ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
        )
        output = ext.name.replace(".", "/") + ".abi3.so"
        objects += ext.extra_objects
        _run([*_flags("LDSHARED"), *objects, "-o", output, *ext.extra_link_args])


def stand_in():
    """Modules in setuptools' place; of what is not for extensions they have empty classes."""
    known = {"Extension": Extension, "build_ext": BuildExtension}
    commands = (".command." + name for name in ("build_ext", "build_py", "sdist"))
    for name in ("", ".errors", ".command", *commands):
        module = sys.modules["setuptools" + name] = types.ModuleType("setuptools" + name)
        module.__getattr__ = lambda name: known.get(name) or type(name, (Exception,), {})


def main():
    """Build."""
    stand_in()
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    extensions = [Extension(**entry) for entry in settings["ext-modules"]]
    build = runpy.run_path("pyvmm/_native/build.py")
    build[settings["cmdclass"]["build_ext"].rpartition(".")[2]](extensions).run()
    print(json.dumps(build["IMAGES"]))


def _flags(*names):
    return [word for name in names for word in shlex.split(sysconfig.get_config_var(name))]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main()
