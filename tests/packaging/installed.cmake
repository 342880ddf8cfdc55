# Installs the built library to a folder of its own, then builds and runs a project that finds it.
set(work ${BUILD}/packaging/installed)
file(REMOVE_RECURSE ${work})
set(run COMMAND_ERROR_IS_FATAL ANY)

execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/prefix ${run})
execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE}/tests/packaging/consumer -B ${work}/build
  -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_FLAGS=${FLAGS}
  -DCMAKE_PREFIX_PATH=${work}/prefix ${run})
execute_process(COMMAND ${CMAKE_COMMAND} --build ${work}/build ${run})
execute_process(COMMAND ${work}/build/consumer ${work}/checkpoint ${run})

# The headers must not reach back into the source tree.
file(GLOB_RECURSE exported ${work}/prefix/*.cmake)
foreach(path ${exported})
  file(READ ${path} text)
  string(FIND "${text}" "${SOURCE}/include" found)
  if(NOT found EQUAL -1)
    message(FATAL_ERROR "${path} names the source tree")
  endif()
endforeach()

execute_process(COMMAND ${work}/prefix/bin/strandline verify ${work}/checkpoint ${run})
