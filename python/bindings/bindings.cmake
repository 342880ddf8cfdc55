# The extension module strandline._core, its type stub, and what a wheel carries.
#
# Everything of ours is linked into _core statically and hidden, so that two copies of the engine in
# one process (this package and a C++ library that embeds it) never see each other's symbols. fmt is
# used header-only for the same reason. What stays dynamic is libsimdjson.so: Debian ships no static
# one. A wheel for other machines must be repaired (auditwheel) to carry it along.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(nanobind CONFIG REQUIRED)

file(GLOB binding_sources CONFIGURE_DEPENDS python/bindings/*.cc)
# NOMINSIZE: the walk over the state dict is on the save path, so it is built for speed.
nanobind_add_module(_core NB_STATIC NOMINSIZE NB_SUPPRESS_WARNINGS ${binding_sources})
target_link_libraries(_core PRIVATE strandline strandline_flags)
target_link_options(_core PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_core PROPERTIES
  CXX_VISIBILITY_PRESET hidden
  VISIBILITY_INLINES_HIDDEN ON
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/module)

# The stub is read off the module that was just built, which is imported alone: _core must not
# import the Python files of the package while it initialises.
nanobind_add_stub(strandline_stub
  MODULE _core
  PYTHON_PATH ${CMAKE_CURRENT_BINARY_DIR}/module
  OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/module/_core.pyi
  DEPENDS _core)

install(TARGETS _core LIBRARY DESTINATION strandline)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/module/_core.pyi DESTINATION strandline)
if(STRANDLINE_TOOLS)
  install(TARGETS strandline_cli RUNTIME DESTINATION ${SKBUILD_SCRIPTS_DIR})
endif()
