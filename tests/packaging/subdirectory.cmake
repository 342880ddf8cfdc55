# Configures a project that contains this one. Nothing is built: what could go wrong here, and does
# not in the other test, are names and settings that leak into the project around it.
set(work ${BUILD}/packaging/subdirectory)
file(REMOVE_RECURSE ${work})
execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE}/tests/packaging/embedder -B ${work}
  -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${COMPILER} -DSTRANDLINE_SOURCE=${SOURCE}
  COMMAND_ERROR_IS_FATAL ANY)
